"""One module for each sub-command of `python -m ec2face_lab`; their docstrings are the help."""
