"""The page that shows results: `page` renders it, `view` decides what it says, `charts` draws."""
