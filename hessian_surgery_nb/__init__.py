"Balances the class accuracies of a trained network. `dir()` lists what is here."

from hessian_surgery_nb.app.face import __dir__, __getattr__  # noqa: F401

__version__ = "0.1.0"
