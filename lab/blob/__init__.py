"""The laboratory's Azure blob server: page and block blobs with real bytes, for the unmodified azure-storage-blob SDK.

`store.BlobStore` holds one storage account on disk (SQLite for what is known, slot files for the bytes);
`server.BlobServer` speaks the REST interface over it; `faults.BlobFaults` makes it misbehave on request.
May import the standard library and aiohttp, never a room of the product.

Source of the behaviour: Microsoft's Blob service REST reference as summed up in the Azure reference, section D.3;
checked against the SDK and Azurite, never against real Azure.
"""
