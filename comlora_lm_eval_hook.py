"""Imported at Python's start by comlora_lm_eval_hook.pth; lets lm_eval find our tasks and our adapters' base models.

Only an import hook is installed here, and nothing but `sys` is needed for it. When lm_eval imports one of the modules
below, `comlora_trl.evaluation.hook` changes it; an error there leaves lm_eval as it is. COMLORA_LM_EVAL_HOOK=0 in the
environment switches it off.
"""

import sys

TARGETS = ("lm_eval.models.huggingface", "lm_eval.models.vllm_causallms", "lm_eval.tasks.manager")


def apply(name, module):
    """Changes the module; a failure is told in one line and leaves lm_eval as it is."""
    try:
        from comlora_trl.evaluation.hook import apply as change

        change(name, module)
    except Exception as error:
        print(f"comlora-trl: lm_eval is left as it is ({type(error).__name__}: {error})", file=sys.stderr)


class Finder:
    """Finds the targets as Python would, and has their loader call [`apply`] at the end."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in TARGETS:
            return None
        for finder in sys.meta_path:
            spec = None if finder is cls else finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        try:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                apply(name, module)

            spec.loader.exec_module = exec_module
        except Exception:  # a loader that takes no attribute: lm_eval works as if we were not there
            pass
        return spec


def install():
    """Installs the import hook, once; modules that are there already are changed at once."""
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)
    for name in TARGETS:
        if name in sys.modules:
            apply(name, sys.modules[name])
