"""Artifacts as OCI artifacts, in a registry or a layout folder. Standard library only, so a lean host can pull.

Nothing that a registry answers is believed before its digest has been compared, and no name it gives leaves the folder.
Formats: OCI image and distribution specifications 1.1, ModelPack's media types.
"""
