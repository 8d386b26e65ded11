"""Chats: recognised in all the forms they come in, hashed as they are, and made text of by the tokenizer's template."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fasp_lightning.errors import FaspError
from fasp_lightning.text.config import SPLITS, TextConfig
from fasp_lightning.text.reading.chats import Chat, document_of, rendered
from fasp_lightning.text.tokenizer import TokenizerTraining, train_tokenizer
from fasp_lightning.text.tokens import Packing, documents, encode_documents, read_text

TEMPLATE = "{% for one in messages %}[{{ one.role }}] {{ one.content }}\n{% endfor %}"
ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT, WITH_SYSTEM = [ASKED, ANSWERED], [{"role": "system", "content": "s"}, ASKED, ANSWERED]


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    found = copy.deepcopy(tiny_tokenizer)
    found.chat_template = TEMPLATE
    return found


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"id": 1, "messages": CHAT}, CHAT),
        ({"conversation": [{**ASKED, "name": None}, ANSWERED]}, CHAT),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            WITH_SYSTEM,
        ),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, CHAT),
        ({"text": CHAT}, CHAT),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWERED]}, CHAT),
        ({"prompt": "q", "completion": "a"}, CHAT),
        ({"prompt": WITH_SYSTEM[:2], "completion": [ANSWERED]}, WITH_SYSTEM),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, CHAT),
        ({"prompt": "q", "chosen": CHAT, "rejected": CHAT}, CHAT),
        ({"instruction": "q", "input": "", "output": "a"}, CHAT),
        ({"question": "q", "answer": "a"}, CHAT),
        ({"id": 1, "system_prompt": "s", "question": "q", "response": "a"}, WITH_SYSTEM),
        ({"input": "q", "output": "a"}, CHAT),
        ({"instruction": "q", "input": "i", "output": "a"}, [{"role": "user", "content": "q\n\ni"}, ANSWERED]),
    ],
)
def test_a_chat_is_the_same_in_every_form(row: dict[str, Any], messages: list[dict[str, str]]) -> None:
    found = document_of(row, "text")
    assert isinstance(found, Chat)
    assert json.loads(found) == messages
    assert found == document_of({"messages": messages}, "messages")


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"n": {"type": "number"}}}}}


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"prompt": "q", "completion": "a"}])
@pytest.mark.parametrize(
    "tools", [[TOOL], json.dumps([TOOL]), [{**TOOL, "strict": None}]], ids=["list", "json", "null"]
)
def test_the_tools_of_a_row_reach_the_template(row: dict[str, Any], tools: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ tools | tojson }}" + TEMPLATE
    columns = ("text", "messages") if "messages" in row else ("text",)
    for column in columns:
        text = rendered(document_of({**row, "tools": tools}, column) or "", tokenizer)
        said, _, chat = text.partition("[user]")
        assert json.loads(said) == [TOOL]
        assert chat == " q\n[assistant] a\n"


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_a_chat_with_no_tools_is_that_without_the_column(tools: Any) -> None:
    assert document_of({"messages": CHAT, "tools": tools}, "text") == document_of({"messages": CHAT}, "text")


@pytest.mark.parametrize(("tools", "fault"), [("hammer", "got str"), (["add"], "got list of str"), ({"a": 1}, "dict")])
def test_what_are_no_tools_is_refused(tools: Any, fault: str) -> None:
    with pytest.raises(FaspError, match=rf"'tools' must hold a list .*{fault}; rename or drop"):
        document_of({"messages": CHAT, "tools": tools}, "text")


@pytest.mark.parametrize("row", [{"text": "a", "messages": CHAT}, {"text": "a", "prompt": "q", "completion": "b"}])
def test_a_column_that_is_there_comes_before_a_chat(row: dict[str, Any]) -> None:
    assert document_of(row, "text") == "a"
    assert not isinstance(document_of(row, "text"), Chat)


@pytest.mark.parametrize("row", [{"messages": None}, {"messages": []}, {"prompt": "q", "completion": None}, {"n": 1}])
def test_a_row_may_hold_none(row: dict[str, Any]) -> None:
    assert document_of(row, "text") is None


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ("words", r"the messages of a chat \(each with role and content\), got str"),
        (["words"], "got list of str"),
        ([{"role": "user"}], "got list of dict"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content of a message must be text, got image_url"),
    ],
)
def test_what_is_no_chat_is_refused(messages: Any, fault: str) -> None:
    with pytest.raises(FaspError, match=fault):
        document_of({"messages": messages}, "text")


def test_the_template_makes_text_of_chats_and_leaves_other_documents(tokenizer: Any) -> None:
    chat = document_of({"messages": WITH_SYSTEM}, "text") or ""
    text = "[system] s\n[user] q\n[assistant] a\n"
    assert rendered(chat, tokenizer) == text
    assert rendered(str(chat), tokenizer) == str(chat)
    assert encode_documents([chat, "plain"], tokenizer) == encode_documents([text, "plain"], tokenizer)


def test_without_a_template_the_line_that_converts_is_named(tiny_tokenizer: Any) -> None:
    for make in (
        lambda: encode_documents([Chat("[]")], tiny_tokenizer),
        lambda: train_tokenizer([Chat("[]")], TokenizerTraining()),
    ):
        with pytest.raises(FaspError, match=r"needs a tokenizer with a chat template.*datasets\.load_dataset\("):
            make()


def test_a_chat_that_the_template_refuses_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(FaspError, match="which says: roles must alternate; its roles are user, assistant"):
        rendered(Chat(json.dumps(CHAT)), tokenizer)


@pytest.mark.parametrize("separator", [None, "\n"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_the_template_s_own_bos_is_no_second_one(add_bos: bool, separator: str | None, tokenizer: Any) -> None:
    begun, chat = copy.deepcopy(tokenizer), document_of({"messages": CHAT}, "messages") or ""
    begun.chat_template = "{{ bos_token }}" + TEMPLATE
    text = TextConfig("chats.jsonl", add_bos=add_bos, separator=separator)
    found, plain = (Packing.of(text, one, 16).encode([chat, chat]) for one in (begun, tokenizer))
    assert [one for one in found if one != begun.bos_token_id] == plain
    assert found.count(begun.bos_token_id) == (0 if add_bos else 2)


def test_splits_of_chats_do_not_depend_on_the_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "chats.jsonl"
    rows = [[{"role": "user", "content": f"question {n} " * 5}, ANSWERED] for n in range(60)]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    splits = [list(documents(TextConfig(str(file), split=split))) for split in SPLITS]
    assert sorted(map(len, splits))[0] > 0
    assert sum(map(len, splits)) == 60
    found = read_text(TextConfig(str(file), split="train", seq_len=16, sequences=None), tokenizer)
    assert found.documents == found.chats == len(splits[SPLITS.index("train")])
