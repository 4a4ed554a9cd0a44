"""The rules of a recipe that name a tensor, as `nibble quantize --rule` takes them: one a line, without algorithms.

    python3 scripts/peers/rules.py RECIPE.toml
"""

import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    recipe = tomllib.load(file)
for rule in recipe["rule"]:
    if "pattern" in rule and "scheme" in rule:
        print(f"{rule['pattern']}={rule['scheme']}")
