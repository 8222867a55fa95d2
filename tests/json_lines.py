"""Files of JSON lines for hypothesis tests."""

import json
from typing import Any

from hypothesis import strategies as st


def json_lines(options: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    """Lines with these options, and with what else may stand in such a file."""
    line = st.builds(
        lambda start, rest, escape: json.dumps({**start, **rest}, ensure_ascii=escape),
        st.sampled_from([{"prompt": "a cat"}, {"prompt": "a cat\u2028\0\ud800"}, {}]),
        options,
        st.booleans(),
    )
    lines = st.lists(line | st.sampled_from(["", " ", "\ufeff", "a cat"]), min_size=1, max_size=3)
    return lines.map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))
