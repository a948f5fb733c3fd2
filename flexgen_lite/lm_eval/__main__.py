"""`lm_eval`'s command line with the model `flexgen_lite` in it: the harness itself knows no plugins.

python -m flexgen_lite.lm_eval --model flexgen_lite --model_args pretrained=DIR --tasks ...
"""

from __future__ import annotations


def main() -> None:
    try:
        import lm_eval.models  # noqa: F401  # registers the harness' own, which it does only where there are none yet
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise SystemExit(f"error: {error}: pip install flexgen-lite[lm-eval]") from None
    import flexgen_lite.lm_eval.model  # noqa: F401  # registers ours

    cli_evaluate()


if __name__ == "__main__":
    main()
