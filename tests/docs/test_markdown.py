"""The reader of the documents, on a small one."""

from tests.docs.markdown import Block, anchors, blocks, inline_code, links

DOCUMENT = """# A title: `code`, and more

See [there](b.md#part-two) and `make x`, not `[this](c.md)`.

<!-- not run: needs two hosts -->
```sh
one \\
  two  # [no link](d.md)
```

```python
three = 3
```

## Part two
## Part two
"""


def test_blocks_have_language_text_line_and_remark() -> None:
    first, second = blocks(DOCUMENT)
    assert first.commands == ["one    two  # [no link](d.md)"]
    assert (first.remark, first.line) == ("not run: needs two hosts", 6)
    assert second == Block("python", "three = 3\n", None, 11)


def test_links_and_code_are_those_of_the_prose() -> None:
    assert links(DOCUMENT) == ["b.md#part-two"]
    assert inline_code(DOCUMENT) == ["code", "make x", "[this](c.md)"]


def test_anchors_are_those_of_github() -> None:
    assert anchors(DOCUMENT) == {"a-title-code-and-more", "part-two", "part-two-1"}
