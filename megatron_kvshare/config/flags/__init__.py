"""From command lines and YAML files to checked dataclasses; knows no setting of ours."""
