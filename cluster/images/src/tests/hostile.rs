//! Archives that want more than they should get: one test each.

use std::io::Write;

use proptest::prelude::*;

use super::*;

#[track_caller]
fn assert_refused(archive: &[u8], words: &[&str]) {
    let text = refusal(archive);
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

#[test]
fn a_path_with_dots_is_refused_and_named() {
    assert_refused(&Tar::new().file("a/../../etc/passwd", b"x").finish(), &["leaves", "a/../../etc/passwd"]);
    assert_refused(&Tar::new().file("..", b"x").finish(), &["leaves"]);
}

#[test]
fn an_absolute_path_is_refused_and_named() {
    assert_refused(&Tar::new().file("/etc/passwd", b"x").finish(), &["leaves", "/etc/passwd"]);
}

#[test]
fn a_name_with_a_nul_byte_is_refused() {
    let archive = Tar::new().with_pax(&[("path", b"a\0b")], "short", b"x").finish();
    assert_refused(&archive, &["NUL", "a\\0b"]);
}

#[test]
fn a_name_that_is_too_long_is_refused() {
    let archive = Tar::new().with_pax(&[("path", "n".repeat(256).as_bytes())], "short", b"x").finish();
    assert_refused(&archive, &["255"]);
    let archive = Tar::new().with_pax(&[("path", "n/".repeat(3000).as_bytes())], "short", b"x").finish();
    assert_refused(&archive, &["4096"]);
}

#[test]
fn an_empty_name_is_refused() {
    assert_refused(&Tar::new().file("", b"x").finish(), &["empty"]);
}

#[test]
fn a_path_that_is_too_deep_is_refused_even_behind_links() {
    let mut archive = Tar::new();
    let deep = "d/".repeat(300);
    archive = archive.with_pax(&[("path", format!("{deep}f").as_bytes())], "f", b"x");
    let mut symlink = Header::new_gnu();
    symlink.set_entry_type(EntryType::Symlink);
    symlink.set_size(0);
    archive.0.append_link(&mut symlink, "jump", deep.trim_end_matches('/')).unwrap();
    archive = archive.with_pax(&[("path", format!("jump/{deep}f").as_bytes())], "f", b"x");
    assert_refused(&archive.finish(), &["512 directories"]);
}

#[test]
fn links_in_a_circle_are_refused() {
    let archive = Tar::new().symlink("a", "b").symlink("b", "a").file("a/x", b"").finish();
    assert_refused(&archive, &["40 symbolic links", "a/x"]);
}

#[test]
fn a_link_with_an_empty_target_is_refused() {
    assert_refused(&Tar::new().symlink("a", "").finish(), &["empty target"]);
}

#[test]
fn a_hard_link_to_nothing_to_a_directory_or_out_of_the_image_is_refused() {
    for target in ["nothing", "dir", "../dir/x", "."] {
        let archive = Tar::new().directory("dir").hardlink("a", target).finish();
        assert_refused(&archive, &["hard link", "\"a\""]);
    }
}

#[test]
fn an_entry_below_a_file_is_refused() {
    assert_refused(&Tar::new().file("a", b"x").file("a/b", b"y").finish(), &["no directory", "a/b"]);
}

#[test]
fn a_root_that_is_a_file_is_refused() {
    assert_refused(&Tar::new().file(".", b"x").finish(), &["root"]);
}

#[test]
fn a_truncated_archive_is_refused_wherever_it_was_cut_and_the_entry_named() {
    let whole = Tar::new().file("first", &[1; 600]).file("second", &[2; 600]).finish();
    // Header and contents of the first take 512 + 1024 bytes, so do those of the second; two blocks end it.
    assert_eq!(whole.len(), 4096);
    for cut in 512..3072 {
        let text = refusal(&whole[..cut]);
        let entry = if cut < 2048 { "first" } else { "second" };
        assert!(text.contains("truncated") && text.contains(entry), "cut at {cut}: {text}");
    }
}

#[test]
fn a_truncated_compressed_archive_is_refused() {
    let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    gzip.write_all(&Tar::new().file("a", &[1; 60_000]).finish()).unwrap();
    let whole = gzip.finish().unwrap();
    assert_refused(&whole[..whole.len() / 2], &["reading the source"]);
}

#[test]
fn bytes_that_are_no_archive_are_refused() {
    assert_refused(b"hello", &["no tar archive"]);
    assert_refused(&[7; 4096], &["no tar archive"]);
    assert_refused(b"", &["no tar archive"]);
}

#[test]
fn a_header_with_a_wrong_checksum_is_refused_after_the_entry_before() {
    let mut archive = Tar::new().file("good", b"x").file("bad", b"y").finish();
    archive[1024] ^= 1;
    assert_refused(&archive, &["checksum", "good"]);
}

#[test]
fn sparse_files_are_refused_by_name() {
    let archive = Tar::new().entry(EntryType::GNUSparse, "holes", "", b"").finish();
    assert_refused(&archive, &["sparse", "holes"]);
    let archive = Tar::new().with_pax(&[("GNU.sparse.major", b"1")], "holes", b"").finish();
    assert_refused(&archive, &["sparse"]);
}

#[test]
fn an_extended_header_that_is_huge_or_senseless_is_refused() {
    let archive = Tar::new().entry(EntryType::XHeader, "pax", "", &vec![b'x'; 2 << 20]).finish();
    assert_refused(&archive, &["1 MiB"]);
    for records in
        ["9999 path=x\n", "0 path=x\n", "12 path", "x", "11 path=abcd", "99999999999999999999999 a=b\n"]
    {
        let archive =
            Tar::new().entry(EntryType::XHeader, "pax", "", records.as_bytes()).file("a", b"").finish();
        assert_refused(&archive, &["extended header"]);
    }
}

#[test]
fn attributes_that_are_too_large_are_refused() {
    let value = vec![b'v'; 60_000];
    let records: Vec<(&str, &[u8])> = vec![
        ("SCHILY.xattr.user.a", &value),
        ("SCHILY.xattr.user.b", &value),
        ("SCHILY.xattr.user.c", &value),
    ];
    assert_refused(&Tar::new().with_pax(&records, "heavy", b"").finish(), &["attributes", "heavy"]);
    let records: Vec<(&str, &[u8])> = vec![("SCHILY.xattr.user.a", &value), ("SCHILY.xattr.user.b", &value)];
    let paths = import(&Tar::new().with_pax(&records, "allowed", &[3; 3000]).finish());
    assert_eq!(paths[b"allowed".as_slice()].xattrs[b"user.b".as_slice()], value);
}

#[test]
fn a_size_beyond_the_archive_is_refused() {
    let archive = Tar::new().with_pax(&[("size", b"18446744073709551615")], "huge", b"").finish();
    assert_refused(&archive, &["truncated", "huge"]);
}

#[test]
fn a_bomb_is_stopped_at_its_limit() {
    let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::best());
    let zeros = vec![0; 1 << 20];
    for _ in 0..64 {
        gzip.write_all(&zeros).unwrap();
    }
    let limits = Limits { expanded_bytes: 1 << 20, ..Limits::default() };
    let text = refusal_with(&limits, &gzip.finish().unwrap());
    assert!(text.contains("1048576 bytes after decompression"), "{text}");
}

#[test]
fn each_limit_is_kept() {
    let archive = Tar::new().file("a", &[1; 5000]).file("b", &[2; 5000]).directory("c").finish();
    let default = Limits::default();
    let with = |limits| refusal_with(&limits, &archive);
    assert!(with(Limits { source_bytes: 5000, ..default }).contains("5000 bytes in the source"));
    assert!(with(Limits { entries: 2, ..default }).contains("2 files"));
    assert!(with(Limits { memory_bytes: 600, ..default }).contains("600 bytes of names"));
    assert!(with(Limits { image_bytes: 12_288, ..default }).contains("3 blocks"));
}

#[test]
fn names_in_messages_cannot_play_tricks_on_a_terminal() {
    let text = refusal(&Tar::new().with_pax(&[("path", b"/\x1b[2Jx")], "a", b"").finish());
    assert!(!text.contains('\x1b') && text.contains("\\u{1b}"), "{text}");
}

proptest! {
    #[test]
    fn a_flipped_byte_never_panics(at in 0usize..6000, value: u8) {
        let mut archive = Tar::new()
            .with_pax(&[("SCHILY.xattr.user.a", b"b"), ("mtime", b"1.5")], "a/b", b"contents")
            .hardlink("c", "a/b")
            .symlink("d", "a")
            .finish();
        let at = at % archive.len();
        archive[at] = value;
        let _any = import_with(&Limits::default(), &archive);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _any = import_with(&Limits::default(), &bytes);
    }
}
