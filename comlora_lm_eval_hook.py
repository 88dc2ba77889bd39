"""Imported at Python's start by comlora_lm_eval_hook.pth: lm_eval then finds our tasks and our adapters' base models.

Only an import hook is installed here, and nothing but `sys` is needed for it. When lm_eval imports one of the modules
below, `comlora_trl.evaluation.hook` changes it; an error there leaves lm_eval as it is, and one line says so.
COMLORA_LM_EVAL_HOOK=0 in the environment switches it off.
"""

import sys

TARGETS = (
    "lm_eval.config.evaluate_config",
    "lm_eval.models.huggingface",
    "lm_eval.models.vllm_causallms",
    "lm_eval.tasks.manager",
)
_told = False


def tell(error):
    """Says once, in one line, that lm_eval goes on without us."""
    global _told
    if not _told and sys.stderr is not None:
        _told = True
        reason = (str(error).splitlines() or [""])[0]
        print(f"comlora-trl: lm_eval is left as it is ({type(error).__name__}: {reason})", file=sys.stderr)


def load_package():
    """Makes `comlora_trl` the package beside this file, even if another folder of that name comes first on the path.

    Raises:
        ImportError: another package or module of that name hides this one; it stays as it is.
    """
    import importlib.util
    import os

    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "comlora_trl")
    loaded = sys.modules.get("comlora_trl")
    spec = loaded.__spec__ if loaded else importlib.util.find_spec("comlora_trl")
    origin = getattr(spec, "origin", None)
    if origin and os.path.realpath(os.path.dirname(origin)) == os.path.realpath(folder):
        return
    if origin or loaded:
        raise ImportError(f"{origin or loaded} hides the installed comlora_trl; rename it, or run from another folder")
    # nothing, or a folder without code, which Python takes for a namespace
    path = os.path.join(folder, "__init__.py")
    spec = importlib.util.spec_from_file_location("comlora_trl", path, submodule_search_locations=[folder])
    module = importlib.util.module_from_spec(spec)
    sys.modules["comlora_trl"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["comlora_trl"]
        raise


def apply(name, module):
    """Changes the module. A failure prints one line and leaves lm_eval as it is."""
    try:
        load_package()
        from comlora_trl.evaluation.hook import apply as change

        change(name, module, tell)
    except Exception as error:
        tell(error)


class Finder:
    """Finds the targets as Python would, and has their loader call [`apply`] at the end."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in TARGETS:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)  # Python skips finders without it, too
            spec = None if finder is cls or find is None else find(name, path, target)
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
        except Exception as error:  # a loader that accepts no attribute: lm_eval runs unchanged
            tell(error)
        return spec


def install():
    """Installs the import hook, once; modules that are there already are changed at once."""
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)
    for name in TARGETS:
        if name in sys.modules:
            apply(name, sys.modules[name])
