"""Heat maps, tables and the HTML report."""
