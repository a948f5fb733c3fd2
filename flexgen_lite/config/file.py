"""The YAML file of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from flexgen_lite.text.shown import shown_path, shown_text


class YamlError(ValueError):
    """A file that cannot be read as keys and values; the message names file and line."""


class StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{shown_text(key)} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise YamlError(f"config='{shown_path(path)}' cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise YamlError(f"config='{shown_path(path)}' is not text in UTF-8: give a YAML file") from None
    except RecursionError:
        raise YamlError(f"config='{shown_path(path)}' is nested too deeply: give lines of key: value") from None
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise YamlError(f"config='{shown_path(path)}'{where} is not good YAML: {shown_path(error.problem)}") from None
    except (yaml.YAMLError, ValueError):  # a number of too many digits, or a date that is none
        raise YamlError(f"config='{shown_path(path)}' is not good YAML: give lines of key: value") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise YamlError(f"config='{shown_path(path)}' has no keys at its top: give lines of key: value")
    return values
