"""How people lay out images: folders, zips, class folders, tables of captions, and what lies beside shards."""
