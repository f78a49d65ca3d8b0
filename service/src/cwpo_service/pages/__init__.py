"""Files of the pages for browsers; scripts and styles are in files of their own, never inline."""
