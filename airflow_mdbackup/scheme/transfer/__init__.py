"""Bytes from the provider.

::

    sftp              many files in flight over one SFTP channel
      sftp_files      what is asked for, what is on its way, and what became of it
      packet_stream   packets over a channel, sent and received
      sftp_packets    the parts of packets, written and read
    partial_file      a file that is not whole yet, and can be resumed
    rate_limit        one bandwidth, shared by tasks
"""
