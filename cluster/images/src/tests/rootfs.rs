//! Plain root file systems.

use std::io::Write;
use std::process::Command;

use super::*;

fn rich() -> Vec<u8> {
    let big: Vec<u8> = (0..10_000u32).map(|n| (n % 253) as u8).collect();
    let mut tar = Tar::new()
        .directory("./")
        .directory("./etc/")
        .file("./etc/passwd", b"root:x:0:0::/root:/bin/sh\n")
        .file("./empty", b"")
        .file("./block", &[9; 4096])
        .file("./big", &big)
        .hardlink("./etc/big", "./big")
        .symlink("./link", "etc/passwd")
        .symlink("./long", &"x".repeat(90))
        .with_pax(
            &[
                ("SCHILY.xattr.security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
                ("SCHILY.xattr.user.note", b"a=b\n"),
                ("SCHILY.xattr.com.apple.quarantine", b"x"),
                ("SCHILY.xattr.trusted.overlay.redirect", b"/"),
                ("mtime", b"1234567890.5"),
                ("uid", b"3000000000"),
            ],
            "./usr/bin/tool",
            b"tool",
        );
    for name in 0..700 {
        tar = tar.file(&format!("./many/a-rather-long-name-to-fill-blocks-{name:05}"), b"x");
    }
    let mut header = Header::new_ustar();
    header.set_path("dev/console").unwrap();
    header.set_entry_type(EntryType::Char);
    header.set_device_major(5).unwrap();
    header.set_device_minor(1).unwrap();
    header.set_mode(0o4600);
    header.set_size(0);
    header.set_cksum();
    tar.0.append(&header, &b""[..]).unwrap();
    tar.entry(EntryType::Fifo, "dev/pipe", "", b"").finish()
}

#[test]
fn files_links_devices_owners_times_and_attributes_arrive() {
    let paths = import(&rich());
    let found = |path: &str| &paths[path.as_bytes()];
    let passwd = found("etc/passwd");
    assert_eq!(passwd.data, b"root:x:0:0::/root:/bin/sh\n");
    assert_eq!((passwd.mode, passwd.uid, passwd.gid, passwd.mtime), (0o100_640, 7, 8, (1_000_000, 0)));
    assert!(passwd.inline, "a small file lies behind its inode");
    assert_eq!(found("").mode, 0o040_750);
    assert_eq!(found("big").nid, found("etc/big").nid);
    assert_eq!((found("big").links, found("big").data.len()), (2, 10_000));
    assert!(!found("big").inline, "a large file has whole blocks");
    assert_eq!((found("link").mode, found("link").data.as_slice()), (0o120_640, b"etc/passwd".as_slice()));
    let tool = found("usr/bin/tool");
    assert_eq!((tool.uid, tool.mtime), (3_000_000_000, (1_234_567_890, 500_000_000)));
    let names: Vec<&[u8]> = tool.xattrs.keys().map(Vec::as_slice).collect();
    assert_eq!(names, [b"security.capability".as_slice(), b"user.note"]);
    assert_eq!(tool.xattrs[b"user.note".as_slice()], b"a=b\n");
    assert_eq!((found("usr").mode, found("usr").uid), (0o040_755, 0), "a directory that no entry names");
    assert_eq!((found("dev/console").mode, found("dev/console").rdev), (0o024_600, 0x501));
    assert_eq!(found("dev/pipe").mode, 0o010_640);
    assert_eq!(paths.keys().filter(|path| path.starts_with(b"many/")).count(), 700);
}

#[test]
fn the_same_archive_gives_the_same_bytes_however_it_is_compressed() {
    let plain = rich();
    let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let zstd =
        ruzstd::encoding::compress_to_vec(plain.as_slice(), ruzstd::encoding::CompressionLevel::Fastest);
    let limits = Limits::default();
    let (first, _, image) = import_with(&limits, &plain).unwrap();
    for other in [plain, gzip.finish().unwrap(), zstd] {
        assert_eq!(import_with(&limits, &other).unwrap().0, first);
    }
    use sha2::Digest;
    assert_eq!(first.sha256.as_slice(), sha2::Sha256::digest(&image).as_slice());
}

#[test]
fn the_tools_of_erofs_find_no_fault() {
    let (imported, _, image) = import_with(&Limits::default(), &rich()).unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&image).unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let output = match Command::new(program).args(arguments).arg(file.path()).output() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("skipped: {program} is not installed (package erofs-utils)");
                return None;
            }
            output => output.unwrap(),
        };
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{program}: {text}");
        Some(text)
    };
    run("fsck.erofs", &["--extract"]);
    if let Some(text) = run("dump.erofs", &["-s"]) {
        assert!(text.contains(&format!("{}", imported.files)), "{text}");
    }
    if let Some(text) = run("dump.erofs", &["--path=/usr/bin/tool"]) {
        assert!(text.contains("Uid: 3000000000"), "{text}");
        assert!(text.contains("Xattr size: 60"), "{text}");
    }
}

#[test]
fn the_last_of_several_entries_with_one_name_wins() {
    let archive = Tar::new()
        .file("a", b"old")
        .file("a", b"new")
        .file("d/inner", b"1")
        .directory("d")
        .symlink("s", "x")
        .directory("s")
        .directory("e")
        .file("e", b"no directory any more")
        .finish();
    let paths = import(&archive);
    assert_eq!(paths[b"a".as_slice()].data, b"new");
    assert_eq!(paths[b"d/inner".as_slice()].data, b"1");
    assert_eq!(paths[b"d".as_slice()].mode, 0o040_750);
    assert_eq!(paths[b"s".as_slice()].mode & 0o170_000, 0o040_000);
    assert_eq!(paths[b"e".as_slice()].data, b"no directory any more");
}

#[test]
fn an_entry_below_a_link_goes_where_the_link_leads_inside_of_the_image() {
    let archive = Tar::new()
        .directory("usr/bin")
        .symlink("bin", "usr/bin")
        .file("bin/sh", b"shell")
        .symlink("out", "../../../../tmp/x")
        .file("out/file", b"kept inside")
        .symlink("abs", "/srv")
        .file("abs/file", b"too")
        .finish();
    let paths = import(&archive);
    assert_eq!(paths[b"usr/bin/sh".as_slice()].data, b"shell");
    assert_eq!(paths[b"tmp/x/file".as_slice()].data, b"kept inside");
    assert_eq!(paths[b"srv/file".as_slice()].data, b"too");
}

#[test]
fn long_names_of_both_styles_are_read() {
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    let mut gnu = Builder::new(vec![]);
    let mut header = Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o600);
    gnu.append_data(&mut header, &long, &b"1"[..]).unwrap();
    let paths = import(&gnu.into_inner().unwrap());
    assert_eq!(paths[long.as_bytes()].data, b"1");
    let pax = Tar::new().with_pax(&[("path", long.as_bytes())], "short", b"2").finish();
    assert_eq!(import(&pax)[long.as_bytes()].data, b"2");
}

#[test]
fn an_archive_without_entries_is_an_empty_root() {
    let paths = import(&Tar::new().finish());
    assert_eq!(paths.len(), 1);
}
