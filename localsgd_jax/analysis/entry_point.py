"""Import of user functions by entry-point name `module:function`."""

import pkgutil
import sys
from collections.abc import Callable


def import_function(name: str) -> Callable:
    """Imports a function by its entry-point name `module:function`.

    Args:
      name: entry-point name. The working directory is searched for the module, too.

    Returns:
      The function.

    Raises:
      ValueError: if the name has another form, or if there is no such module or
        function. An import that fails within the module raises its own error.

    Example:
      >>> import_function("math:sqrt")(9)
      3.0
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(
            f"MODULE:FUNCTION: a name like module:function is needed, got {name!r}"
        )
    sys.path.insert(0, "")
    try:
        imported = pkgutil.resolve_name(name)
    except ModuleNotFoundError as error:
        if (error.name or "") not in (module, module.partition(".")[0]):
            raise
        raise ValueError(f"{name}: there is no module {error.name!r}") from None
    except AttributeError as error:
        if error.obj is not sys.modules.get(module):
            raise
        imported = None
    finally:
        sys.path.remove("")
    if not callable(imported):
        raise ValueError(f"{name}: module {module} has no function {function!r}")
    return imported


def describe_result(result: object) -> str:
    """Describes the result of a user function for an error message.

    Args:
      result: any object.

    Returns:
      The types of the entries of a tuple; the text of anything else, cut at 200
      characters.

    Example:
      >>> describe_result((1, "a")), describe_result(None)
      ('(int, str)', 'None')
    """
    if isinstance(result, tuple) and not hasattr(result, "_fields"):
        return f"({', '.join(type(entry).__name__ for entry in result)})"
    text = repr(result)
    return text if len(text) <= 200 else text[:200] + " …"
