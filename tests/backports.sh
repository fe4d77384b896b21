#!/bin/sh
# Unpacks the newest kernel of Debian's backports into a folder. It installs nothing and leaves this machine's lists of packages alone.
#   backports.sh FOLDER
set -eu
folder=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case ${BLIXARD_RIG_MIRROR:-} in http*) mirror=$BLIXARD_RIG_MIRROR ;; *) mirror=http://deb.debian.org/debian ;; esac
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm-backports main" >"$work/list"
options="-o Dir::Etc::SourceList=$work/list -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists=$work/lists"
options="$options -o Dir::Cache=$work/cache -o APT::Sandbox::User=root -o APT::Architecture=amd64"
# shellcheck disable=SC2086 # a list of words
{
    apt-get -qq $options update
    package=$(apt-cache $options depends linux-image-amd64 | sed -n 's/.*Depends: //p' | head -n 1)
    [ "$(cat "$folder/package" 2>/dev/null)" != "$package" ] || exit 0
    (cd "$work" && apt-get -qq $options download "$package")
}
rm -rf "$folder/boot" "$folder/lib" "$folder/usr"
dpkg-deb -x "$work"/*.deb "$folder"
# Newer packages have them below /usr.
[ -e "$folder/lib" ] || ln -s usr/lib "$folder/lib"
echo "$package" >"$folder/package"
