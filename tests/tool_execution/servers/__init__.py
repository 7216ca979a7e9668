"""Programs that the tests start as servers."""
