# Run a command on a "host" of its own: a network namespace whose only other address is 10.77.0.1, by which the host also
# knows its own name. A second "host", 10.77.0.2, is the namespace of the process OTHER_HOST.
#   unshare --map-root-user --mount --net sh two_hosts.sh COMMAND...
set -e
ip link set lo up
unshare --net sleep infinity &
OTHER_HOST=$!
trap 'kill $OTHER_HOST' EXIT
until [ "$(readlink /proc/$OTHER_HOST/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do :; done
ip link add eth9 type veth peer name eth9 netns "$OTHER_HOST"
ip addr add 10.77.0.1/24 dev eth9
ip link set eth9 up
nsenter --target "$OTHER_HOST" --net sh -c 'ip link set lo up; ip addr add 10.77.0.2/24 dev eth9; ip link set eth9 up'
hosts=$(mktemp)
printf '127.0.0.1 localhost\n10.77.0.1 %s\n' "$(hostname)" >"$hosts"
mount --bind "$hosts" /etc/hosts
rm "$hosts"
export OTHER_HOST
"$@"
