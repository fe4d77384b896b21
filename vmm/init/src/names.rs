//! Host name, `/etc/hosts` and `/etc/resolv.conf` of the guest.

use std::fs::File;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::Path;

use blixard_vmm_api::guest::GuestConfig;

/// The text of `/etc/hosts` (hosts(5)).
fn hosts(config: &GuestConfig) -> String {
    let name = &config.hostname;
    let own: Vec<IpAddr> =
        config.nics.iter().flat_map(|n| &n.addresses).map(|(address, _)| *address).collect();
    let mut text =
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
            .to_owned();
    if own.is_empty() {
        text.push_str(&format!("127.0.1.1\t{name}\n"));
    }
    for address in own {
        text.push_str(&format!("{address}\t{name}\n"));
    }
    text
}

/// The text of `/etc/resolv.conf` (resolv.conf(5)).
fn resolvers(config: &GuestConfig) -> String {
    config.resolvers.iter().map(|address| format!("nameserver {address}\n")).collect()
}

/// Puts a new file in the place of whatever is there: the old one may be a link to where nothing is.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    File::options().write(true).create_new(true).open(path)?.write_all(text.as_bytes())
}

/// Sets the host name and writes the files below `etc`. The answers are what failed, one line each: a guest whose
/// `/etc` cannot be written still runs.
pub fn write(config: &GuestConfig, etc: &Path) -> Vec<String> {
    let mut failed = vec![];
    let mut note = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            failed.push(format!("{what}: {error}"));
        }
    };
    note("/etc", std::fs::create_dir_all(etc));
    note("/etc/hostname", replace(&etc.join("hostname"), &format!("{}\n", config.hostname)));
    note("/etc/hosts", replace(&etc.join("hosts"), &hosts(config)));
    if !config.resolvers.is_empty() {
        note("/etc/resolv.conf", replace(&etc.join("resolv.conf"), &resolvers(config)));
    }
    failed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> GuestConfig {
        serde_json::from_str(
            r#"{"hostname":"web-1","resolvers":["10.0.0.1"],"nics":[{"mac":"52:54:00:00:00:01",
            "addresses":[["10.0.0.5",24],["fd00::5",64]],"gateways":[],"mtu":1500}]}"#,
        )
        .unwrap()
    }

    #[test]
    fn the_own_name_leads_to_the_own_addresses() {
        let etc = tempfile::tempdir().unwrap();
        assert!(write(&config(), etc.path()).is_empty());
        let hosts = std::fs::read_to_string(etc.path().join("hosts")).unwrap();
        assert!(hosts.contains("10.0.0.5\tweb-1\n") && hosts.contains("fd00::5\tweb-1\n"));
        assert_eq!(std::fs::read_to_string(etc.path().join("resolv.conf")).unwrap(), "nameserver 10.0.0.1\n");
    }

    #[test]
    fn a_resolv_conf_that_is_a_dangling_link_is_replaced() {
        let etc = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("../run/nowhere", etc.path().join("resolv.conf")).unwrap();
        assert!(write(&config(), etc.path()).is_empty());
        assert_eq!(std::fs::read_to_string(etc.path().join("resolv.conf")).unwrap(), "nameserver 10.0.0.1\n");
    }

    #[test]
    fn what_cannot_be_written_is_told_and_the_rest_is_written() {
        let etc = tempfile::tempdir().unwrap();
        std::fs::create_dir(etc.path().join("hosts")).unwrap();
        let failed = write(&config(), etc.path());
        assert_eq!(failed.len(), 1);
        assert!(failed[0].starts_with("/etc/hosts: "));
        assert!(etc.path().join("resolv.conf").exists());
    }
}
