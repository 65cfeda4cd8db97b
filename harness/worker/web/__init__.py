"""What stands between a page that this machine serves and the browsers that ask for it."""
