"""Opening a tokenizer: a chat template that cannot be used is no reason to do without the tokenizer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite.chat.template import Chat, ChatError, render
from flexgen_lite.demo.pretrained import MODEL
from flexgen_lite.model.files import CheckpointError
from flexgen_lite.tokens.tokenizer import TextTokenizer
from flexgen_lite.wire.client_messages import Welcome
from flexgen_lite.wire.codec import Codec
from flexgen_lite.workers.model.tokenizer import ModelTokenizer, open_tokenizer
from tests.chat_model import make_chat_model, set_in_config

TALK = [{"role": "user", "content": "Hi"}]
SERVED = "; chat requests that need it are refused, completions are served"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_chat_model(tmp_path, None)


def opened(model: Path) -> ModelTokenizer:
    """With what of it can be sent."""
    found = open_tokenizer(model, str(model.parent))
    assert found.file is not None
    known, text = TextTokenizer(str(MODEL / "tokenizer.json")), "john smith"
    assert TextTokenizer(found.file).encode(text, True) == known.encode(text, True)
    codec = Codec(Welcome)
    welcome = Welcome(7, "m", "f", 1, 1, "".join(found.warnings), found.chat_template)
    assert codec.decode(codec.encode(welcome)) == welcome
    return found


def refusal(model: Path, chat: Chat) -> str:
    with pytest.raises(ChatError) as caught:
        render(chat, opened(model).chat_template)
    return str(caught.value)


def test_a_syntax_error_is_said_at_once(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }\n", encoding="utf-8")
    found = opened(model)
    assert found.warnings == (f"the model's chat template has a syntax error in line 2: unexpected '}}'{SERVED}",)
    assert refusal(model, Chat(TALK)) == "the model's chat template has a syntax error in line 2: unexpected '}'"


def test_of_several_the_broken_one_alone_is_refused(model: Path) -> None:
    set_in_config(
        model,
        [
            {"name": "default", "template": "d"},
            {"name": "tool_use", "template": "\n{% endif %}"},
            {"name": "rag", "template": 5},
        ],
    )
    found = opened(model)
    assert found.warnings[0].startswith("the model's chat template 'tool_use' has a syntax error in line 2: ")
    assert found.warnings[1:] == (
        f"the model's chat template 'rag' cannot be read: it is of the type int, and not a text{SERVED}",
    )
    assert render(Chat(TALK), found.chat_template) == "d"
    assert "has a syntax error in line 2" in refusal(model, Chat(TALK, []))
    assert "'rag' cannot be read" in refusal(model, Chat(TALK, chat_template="rag"))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (5, "it is of the type int, and not a text"),
        (False, "it is of the type bool, and not a text"),
        ("\ud800", "it has characters that are not Unicode text"),
        ([{"name": "default"}], "chat_template in tokenizer_config.json: KeyError: 'template'"),
        (["x"], "chat_template in tokenizer_config.json: TypeError"),
        ([{"name": [], "template": "x"}], "chat_template in tokenizer_config.json: TypeError"),
    ],
)
def test_what_is_no_template(model: Path, template: Any, words: str) -> None:
    set_in_config(model, template)
    (warning,) = opened(model).warnings
    assert warning.startswith(f"the model's chat template cannot be read: {words}") and warning.endswith(SERVED)
    assert f"the model's chat template cannot be read: {words}" in refusal(model, Chat(TALK))
    own = Chat(TALK, chat_template="{{ bos_token }}")
    assert render(own, opened(model).chat_template) == "<s>"


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_a_file_in_another_encoding(model: Path, name: str) -> None:
    path = model / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes("Grüße".encode("latin-1"))
    (warning,) = opened(model).warnings
    where = name.partition("/")[0]
    assert f"cannot be read: {where}: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xfc" in warning
    assert "UnicodeDecodeError" in refusal(model, Chat(TALK))


def test_a_name_in_another_encoding(model: Path) -> None:
    set_in_config(model, {"default": "d", "a\ud800": "x"})
    found = opened(model)
    assert found.warnings == () and found.chat_template is not None
    assert render(Chat(TALK, chat_template="a\\ud800"), found.chat_template) == "x"


def test_a_tokenizer_that_cannot_be_read_is_not_blamed_on_the_template(model: Path) -> None:
    (model / "chat_template.jinja").write_bytes(b"\xff")
    (model / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        open_tokenizer(model, str(model.parent))


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_a_template_that_is_no_file_is_not_waited_for(model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    os.mkfifo(model / name)
    (warning,) = opened(model).warnings
    assert "cannot be read" in warning and "is a named pipe, not a file" in warning


def test_a_tokenizer_json_alone(tmp_path: Path) -> None:
    """Transformers wants more in it than the library that it is for."""
    content = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    del content["added_tokens"]
    model, run_dir = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    run_dir.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (model / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert open_tokenizer(model, str(run_dir)) == ModelTokenizer(str(model / "tokenizer.json"))
    (model / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json holds no tokenizer"):
        open_tokenizer(model, str(run_dir))


def test_no_tokenizer(tmp_path: Path) -> None:
    assert open_tokenizer(tmp_path, str(tmp_path)) == ModelTokenizer(None)
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert open_tokenizer(tmp_path, str(tmp_path)) == ModelTokenizer(None)
