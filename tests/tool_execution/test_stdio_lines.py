"""Cutting output into lines, however it comes in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from toolfleet.services.tool_execution.stdio_lines import LineSplitter, TooLong, answered_id

LINES = st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line), max_size=12)


@given(lines=LINES, cuts=st.lists(st.integers(1, 30), max_size=40), limit=st.integers(0, 30))
def test_any_cutting_gives_the_same_lines(lines: list[bytes], cuts: list[int], limit: int) -> None:
    data = b"".join(line + b"\n" for line in lines)
    splitter = LineSplitter(limit)
    found: list[bytes | TooLong] = []
    for cut in cuts:
        found += splitter.feed(data[:cut])
        data = data[cut:]
    found += splitter.feed(data)

    assert len(found) == len(lines)
    for line, got in zip(lines, found, strict=True):
        if len(line) <= limit:
            assert got == line
        else:
            assert isinstance(got, TooLong)
            assert got.size == len(line)
            assert got.head == line[: len(got.head)]
            assert got.tail == line  # short enough to be there whole


@given(size=st.integers(20_000, 200_000), chunk=st.integers(1_000, 70_000))
def test_of_a_long_line_only_the_edges_are_kept(size: int, chunk: int) -> None:
    line = b'{"jsonrpc":"2.0","id":12,"result":"' + b"x" * size + b'"}'
    splitter = LineSplitter(10_000)
    found: list[bytes | TooLong] = []
    for start in range(0, len(line), chunk):
        found += splitter.feed(line[start : start + chunk])
        assert len(splitter._buffer) <= 10_000
    [long] = found + splitter.feed(b"\nnext")

    assert isinstance(long, TooLong)
    assert long.size == len(line)
    assert len(long.head) == len(long.tail) == 4096
    assert long.request_id() == 12
    assert splitter.feed(b"\n") == [b"next"]


def test_the_id_is_found_at_either_end_and_nowhere_else() -> None:
    inside = b'{"result":{"content":[],"structuredContent":{"id":5}}'
    assert TooLong(0, inside, inside + b',"id":7}').request_id() == 7
    assert TooLong(0, inside, inside + b', "id": 7, "jsonrpc": "2.0"} ').request_id() == 7
    assert TooLong(0, inside, b'"a","id":5}}').request_id() is None
    assert TooLong(0, b'{"id":8,"result":{', b"").request_id() == 8
    assert TooLong(0, b'{"jsonrpc":"2.0","id":"text","result":{', b"").request_id() is None
    assert TooLong(0, b'{"result":{"id":8,', b'"id":8}]}').request_id() is None


def test_the_id_is_found_in_an_answer_that_is_no_json_and_not_in_a_request() -> None:
    assert answered_id(b'{"jsonrpc":"2.0","id":4,"result":{"\xff') == 4
    assert answered_id(b'{"id": 4, "error": \xff}') == 4
    assert answered_id(b'{"jsonrpc":"2.0","result":"\xff","id":4}') == 4
    assert answered_id(b'{"jsonrpc":"2.0","id":4,"method":"ping","params":"\xff"}') is None
    assert answered_id(b'{"jsonrpc":"2.0","method":"x","params":"\xff","id":4}') is None
    assert answered_id(b'\xff "id":4}') is None
