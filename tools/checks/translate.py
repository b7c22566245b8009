"""Prints what CloudFormation makes of a SAM template, so that cfn-lint sees it.

Usage: python translate.py TEMPLATE > OUTPUT. Works offline: no managed policy is
looked up, and local code becomes a made-up S3 URI.
"""

import sys

from samcli.lib.translate.sam_template_validator import SamTemplateValidator
from samcli.yamlhelper import yaml_parse


class NoManagedPolicies:
    """The template writes its own policies; a managed one would have to be asked for."""

    def load(self):
        raise SystemExit("the template names a managed policy, which cannot be translated offline")


def main(path):
    with open(path, encoding="utf-8") as file:
        template = yaml_parse(file.read())
    validator = SamTemplateValidator(template, NoManagedPolicies(), region="us-east-1")
    print(validator.get_translated_template_if_valid())


if __name__ == "__main__":
    main(sys.argv[1])
