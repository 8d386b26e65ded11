"""Files and data sets → rows → documents: which files a source means, how each kind is read, what a row's text is."""
