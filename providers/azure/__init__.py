"""Azure: a target site (`adapter.AzureSite`) and a replica store of page blobs (`pageblobs.AzureReplicaStore`).

The only room that imports the Azure SDKs. Checked against the SDKs' contract and the laboratory, never against real Azure.
"""
