"""The same site under gunicorn: `gunicorn -c gunicorn.conf.py --paste production.ini`."""

bind = "127.0.0.1:8080"
workers = 2
worker_class = "gthread"
#: As many as the pool's maxconn.
threads = 8
preload_app = True
#: Above the pool's timeout, or a request that waits for a connection is killed instead of answered.
timeout = 30
graceful_timeout = 30
paste_global_conf = ["http_port=8080"]
