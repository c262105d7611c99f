"""The same site under gunicorn: `gunicorn -c gunicorn.conf.py --paste production.ini`."""

bind = "127.0.0.1:8080"
workers = 2
worker_class = "gthread"
#: As many as the pool's maxconn.
threads = 8
preload_app = True
#: A worker whose main thread is stuck for so long is killed. With gthread that is no limit for a request.
timeout = 30
graceful_timeout = 30
paste_global_conf = ["http_port=8080"]
