//! What the emulated host is made of, and the keys that cached results carry: a changed recipe has a new key.

use sha2::{Digest, Sha256};
use std::fmt::Write;

/// Runs in the new root at build time.
pub const SETUP: &str = include_str!("recipe/setup.sh");
const PACKAGES: &str = include_str!("recipe/packages.txt");
const LEFT_OUT: &str = include_str!("recipe/left-out.txt");

/// The Debian release of hosts and guests.
pub const SUITE: &str = "bookworm";
/// Packages of the Debian guest image beyond the minimal base.
pub const GUEST_PACKAGES: [&str; 3] = ["iproute2", "curl", "procps"];
/// Runs in the root of the Debian guest image: nothing of the building machine stays in it.
pub const GUEST_SETUP: &str = "echo debian >/etc/hostname; : >/etc/resolv.conf; : >/etc/machine-id";
/// Size of a host's root disk in bytes. The file is sparse.
pub const ROOT_SIZE: u64 = 8 << 30;
/// Size of a host's empty second disk in bytes. The file is sparse.
pub const SCRATCH_SIZE: u64 = 64 << 30;

/// Raised when code outside the recipe's files changes what an image contains.
const IMAGE_VERSION: &str = "1";
const GUESTS_VERSION: &str = "1";

/// Packages of the host.
pub fn packages() -> Vec<&'static str> {
    lines(PACKAGES).flat_map(str::split_whitespace).collect()
}

/// Path patterns that are not unpacked.
pub fn left_out() -> Vec<&'static str> {
    lines(LEFT_OUT).collect()
}

fn lines(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Key of the host image.
pub fn image_key() -> String {
    key(&[IMAGE_VERSION, SUITE, SETUP, PACKAGES, LEFT_OUT, &ROOT_SIZE.to_string()])
}

/// Key of the guest images: they also take a file from the host image.
pub fn guests_key() -> String {
    key(&[GUESTS_VERSION, GUEST_SETUP, &GUEST_PACKAGES.join(" "), &image_key()])
}

/// A short name for a list of texts: the first 8 bytes of the SHA-256 of all of them, in hexadecimal. Each is
/// preceded by its length, so that moving a border between two of them changes the key.
pub fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().iter().take(8).fold(String::new(), |mut text, byte| {
        _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_depends_on_every_part_and_on_the_borders_between_them() {
        let base = key(&["ab", "c"]);
        assert_eq!(base.len(), 16);
        assert_eq!(base, key(&["ab", "c"]));
        assert_ne!(base, key(&["a", "bc"]));
        assert_ne!(base, key(&["ab", "c", ""]));
        assert_ne!(base, key(&["ab", "d"]));
    }

    #[test]
    fn the_lists_have_no_comments_and_no_blanks() {
        assert!(packages().contains(&"linux-image-cloud-amd64"));
        assert!(packages().iter().all(|p| !p.is_empty() && !p.contains(['#', ',', ' '])));
        assert!(left_out().iter().all(|p| p.starts_with('/')));
    }
}
