//! What a user can upload as an image: any archive becomes an EROFS image or a typed error, within bounds.
#![no_main]

use std::io::{Cursor, Seek};

use blixard_images::{ImageSource, Limits, import_rootfs};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let limits = Limits {
        source_bytes: 1 << 20,
        expanded_bytes: 4 << 20,
        image_bytes: 16 << 20,
        entries: 1000,
        memory_bytes: 1 << 20,
    };
    let spool = std::env::temp_dir();
    let Ok(mut out) = tempfile::tempfile_in(&spool) else { return };
    let mut stream = Cursor::new(data);
    let source = ImageSource { stream: &mut stream, spool: &spool };
    if let Ok(image) = import_rootfs(source, &limits, &mut out, &mut |_| {}) {
        assert!(image.bytes <= limits.image_bytes && image.bytes % 4096 == 0);
        assert_eq!(out.seek(std::io::SeekFrom::End(0)).ok(), Some(image.bytes));
    }
});
