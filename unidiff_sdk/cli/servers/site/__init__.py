"""`unidiff web`: a catalog as a static site that searches and generates in the browser of its visitor."""
