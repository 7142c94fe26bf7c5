#!/bin/sh
# bare_nginx.sh FOLDER PORT URL: nginx as a proxy that does nothing but pass on, with its files in FOLDER.
set -eu
mkdir -p "$1/temp"
cat > "$1/nginx.conf" << EOF
worker_processes 1;
daemon off;
pid $1/pid;
error_log /dev/null;
events { worker_connections 4096; }
http {
    access_log off;
    client_body_temp_path $1/temp/body;
    proxy_temp_path $1/temp/proxy;
    fastcgi_temp_path $1/temp/fastcgi;
    uwsgi_temp_path $1/temp/uwsgi;
    scgi_temp_path $1/temp/scgi;
    upstream instance { server ${3#http://}; keepalive 64; }
    server {
        listen 127.0.0.1:$2;
        client_max_body_size 10m;
        client_body_buffer_size 1m;
        location / {
            proxy_pass http://instance;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }
    }
}
EOF
exec nginx -c "$1/nginx.conf"
