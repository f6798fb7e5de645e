"Post-hoc balancing of a trained classifier along the spikes of its Hessian. `dir()` lists what is here."

from hessian_surgery_nb.app.face import __dir__, __getattr__  # noqa: F401

__version__ = "0.1.0"
