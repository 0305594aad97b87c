"""Everything that reproduces the paper with `ec2face_core`; `python -m ec2face_lab --help`."""
