"""`comlora-eval`: lm_eval's own command line, with our tasks and adapters, independent of the .pth file."""


def main() -> None:
    """Runs lm_eval with the same arguments."""
    import comlora_lm_eval_hook

    comlora_lm_eval_hook.install()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
