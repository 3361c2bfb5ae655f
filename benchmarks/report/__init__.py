"""Tables, charts and the page that show results of measuring."""
