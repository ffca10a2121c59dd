"""Bytes from the provider.

::

    sftp              reads many files in parallel over one SFTP channel
      sftp_handshake  the opening handshake: version, limits and round-trip time
      sftp_files      the records: requested files, transfers in progress, results
      packet_stream   sends and receives packets over a channel
      sftp_packets    encodes and decodes the fields of packets
    partial_file      an incomplete file that a later try can resume
    rate_limit        one bandwidth limit, shared by tasks
"""
