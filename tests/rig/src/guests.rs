//! Root file systems for test guests, as plain tars: a small one of Debian's static busybox and a minimal Debian.

use crate::cache::{self, Cache, Entry, Kind};
use crate::image::{self, Builder};
use crate::leash::Leash;
use crate::recipe;
use crate::say::say;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use tar::{EntryType, Header};

const BUSYBOX: &str = "busybox.tar";
const DEBIAN: &str = "debian.tar";

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cache failed.
    #[error("cannot use the cache")]
    Cache(#[from] cache::Error),
    /// The host image or Debian's guest image could not be built.
    #[error("cannot build")]
    Build(#[from] image::Error),
    /// The busybox image could not be written.
    #[error("cannot write {BUSYBOX}")]
    Busybox(#[source] io::Error),
    /// The results could not be copied.
    #[error("cannot copy {path}")]
    Copy {
        /// The target.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Puts the guest images into a folder; what is already there and current stays untouched.
pub fn export(folder: &Path, cache: &Cache, leash: &Leash) -> Result<(), Error> {
    let image = image::ensure(cache, leash)?;
    let guests = cache.ensure(Kind::Guests, &recipe::guests_key(), leash, |new| build(new, &image, leash))?;
    fs::create_dir_all(folder)
        .map_err(|source| Error::Copy { path: folder.display().to_string(), source })?;
    for name in [BUSYBOX, DEBIAN] {
        let to = folder.join(name);
        copy(&guests.file(name), &to)
            .map_err(|source| Error::Copy { path: to.display().to_string(), source })?;
    }
    Ok(())
}

fn build(new: &Path, image: &Entry, leash: &Leash) -> Result<(), Error> {
    say("building the guest images (once for this recipe)");
    busybox(&new.join(BUSYBOX), &image.file("busybox"), &image.file("applets")).map_err(Error::Busybox)?;
    let builder = Builder::new(leash)?;
    let out = builder.out()?.join(DEBIAN);
    let mut command = builder.mmdebstrap();
    command.args(["--variant=minbase", "--components=main", "--format=tar"]);
    for pattern in ["/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*", "/usr/share/info/*"] {
        command.arg(format!("--dpkgopt=path-exclude={pattern}"));
    }
    command.arg(format!("--include={}", recipe::GUEST_PACKAGES.join(",")));
    command.arg(format!("--customize-hook=chroot \"$1\" sh -ec '{}'", recipe::GUEST_SETUP));
    command.arg(recipe::SUITE).arg(&out).args(image::sources());
    builder.step("make the Debian guest image", &mut command)?;
    builder.take(&out, &new.join(DEBIAN))?;
    Ok(())
}

/// Modification times, owners and order are fixed: the same busybox makes the same bytes.
fn busybox(to: &Path, program: &Path, applets: &Path) -> io::Result<()> {
    let mut tar = tar::Builder::new(io::BufWriter::new(File::create(to)?));
    for (folder, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("home", 0o755),
        ("mnt", 0o755),
        ("proc", 0o555),
        ("root", 0o700),
        ("run", 0o755),
        ("sbin", 0o755),
        ("sys", 0o555),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("usr/bin", 0o755),
        ("usr/sbin", 0o755),
        ("var", 0o755),
        ("var/log", 0o755),
        ("var/tmp", 0o1777),
    ] {
        let mut header = header(EntryType::Directory, mode, 0);
        tar.append_data(&mut header, format!("{folder}/"), io::empty())?;
    }
    let bytes = fs::read(program)?;
    add(&mut tar, "bin/busybox", 0o755, &bytes)?;
    for applet in fs::read_to_string(applets)?.lines().filter(|name| *name != "busybox") {
        let mut header = header(EntryType::Symlink, 0o777, 0);
        tar.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    let mut init = header(EntryType::Symlink, 0o777, 0);
    tar.append_link(&mut init, "sbin/init", "../bin/busybox")?;
    for (name, text) in [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
        ),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        ("etc/hostname", "busybox\n"),
        ("etc/resolv.conf", ""),
        ("etc/os-release", "ID=busybox\nNAME=BusyBox\nPRETTY_NAME=\"BusyBox test guest\"\n"),
    ] {
        add(&mut tar, name, 0o644, text.as_bytes())?;
    }
    tar.into_inner()?.into_inner()?.sync_all()
}

fn add(tar: &mut tar::Builder<impl io::Write>, path: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let size = u64::try_from(bytes.len()).map_err(io::Error::other)?;
    tar.append_data(&mut header(EntryType::Regular, mode, size), path, bytes)
}

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let source = fs::metadata(from)?;
    let (length, time) = (source.len(), source.modified()?);
    if fs::metadata(to).is_ok_and(|there| there.len() == length && there.modified().ok() == Some(time)) {
        return Ok(());
    }
    let mut name = to.as_os_str().to_owned();
    name.push(".new");
    fs::copy(from, &name)?;
    File::options().write(true).open(&name)?.set_modified(time)?;
    fs::rename(&name, to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn the_busybox_image_is_a_root_file_system_and_always_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("program"), b"ELF").unwrap();
        fs::write(at("applets"), "busybox\nls\nsh\n").unwrap();
        busybox(&at("one"), &at("program"), &at("applets")).unwrap();
        busybox(&at("two"), &at("program"), &at("applets")).unwrap();
        assert_eq!(fs::read(at("one")).unwrap(), fs::read(at("two")).unwrap());
        let mut archive = tar::Archive::new(File::open(at("one")).unwrap());
        let entries: BTreeMap<_, _> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let path = entry.path().unwrap().display().to_string();
                (
                    path,
                    (
                        entry.header().mode().unwrap(),
                        entry.link_name().unwrap().map(|l| l.display().to_string()),
                    ),
                )
            })
            .collect();
        assert_eq!(entries["tmp/"].0, 0o1777);
        assert_eq!(entries["bin/busybox"], (0o755, None));
        assert_eq!(entries["bin/sh"].1.as_deref(), Some("busybox"));
        assert!(entries.contains_key("etc/passwd"));
    }

    #[test]
    fn a_current_copy_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::write(&from, "abc").unwrap();
        copy(&from, &to).unwrap();
        let identity = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        let before = identity(&to);
        copy(&from, &to).unwrap();
        assert_eq!(identity(&to), before);
        fs::write(&from, "abcd").unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"abcd");
    }
}
