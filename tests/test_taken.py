"""The table of what is taken says what comes out."""

import pytest
import taken


@pytest.mark.slow
def test_the_page_says_what_comes_out(unchecked):
    page = taken.PAGE.read_text(encoding="utf8")
    assert taken.START in page
    assert taken.filled(page) == page
