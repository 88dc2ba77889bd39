"""`comlora-eval`: lm_eval's command line with this package's tasks and adapters. It does not need the .pth file."""


def main() -> None:
    """Runs lm_eval with the process's arguments."""
    import comlora_lm_eval_hook

    comlora_lm_eval_hook.install()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
