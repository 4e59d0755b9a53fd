"""Programs beside the server: `vfu-stream` looks into saved states, `vfu-migrate` moves them.

outcome        exit codes, and how a fault is told     stream, stream_print    vfu-stream
migrate, migrate_file, migrate_show                    vfu-migrate
"""
