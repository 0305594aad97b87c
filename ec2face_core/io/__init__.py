"""Files of faces, read right or refused with a sentence: pictures, masks, texts, hashes, paths."""
