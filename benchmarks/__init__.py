import importlib.util
import sys

# checked first, because the benchmarks import them
if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
    print(f"error: benchmarks need {' and '.join(missing)}; in a clone: pip install -e '.[test]'", file=sys.stderr)
    sys.exit(2)
