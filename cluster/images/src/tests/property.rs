//! Whatever tree is put in, the same tree is in the image.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum What {
    File(Vec<u8>),
    Symlink(String),
    Directory,
}

#[derive(Debug, Clone)]
struct Item {
    mode: u32,
    uid: u64,
    mtime: u64,
    xattrs: BTreeMap<String, Vec<u8>>,
    what: What,
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof!["[a-e]", "[!-.0-~]{1,30}".prop_filter("a name", |n| n != "." && n != ".."), "[a-z]{200,255}"]
}

fn item() -> impl Strategy<Value = Item> {
    let sizes = prop_oneof![0usize..100, 2000..2100usize, 4000..4200usize, 8190..8200usize, Just(20_000)];
    let what = prop_oneof![
        (sizes, any::<u8>()).prop_map(|(size, byte)| What::File(vec![byte; size])),
        prop_oneof!["[a-z/.]{1,80}", "[a-z]{3900,4095}"].prop_map(What::Symlink),
        Just(What::Directory),
    ];
    let xattrs = proptest::collection::btree_map(
        "user[.][a-z]{1,40}",
        proptest::collection::vec(any::<u8>(), 0..5000),
        0..3,
    );
    (0u32..0o10000, 0u64..0xffff_fffe, 0u64..1 << 33, xattrs, what)
        .prop_map(|(mode, uid, mtime, xattrs, what)| Item { mode, uid, mtime, xattrs, what })
}

fn tree() -> impl Strategy<Value = BTreeMap<String, Item>> {
    let path = proptest::collection::vec(name(), 1..4).prop_map(|names| names.join("/"));
    proptest::collection::btree_map(path, item(), 0..60).prop_map(|mut tree| {
        // Nothing lies below what is no directory.
        let all = tree.clone();
        tree.retain(|path, _| {
            path.match_indices('/').all(|(slash, _)| {
                path.get(..slash)
                    .and_then(|parent| all.get(parent))
                    .is_none_or(|parent| matches!(parent.what, What::Directory))
            })
        });
        tree
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_image_holds_the_tree_that_was_put_in(tree in tree()) {
        let mut tar = Tar::new();
        for (path, item) in &tree {
            let mut header = Header::new_ustar();
            header.set_mode(item.mode);
            header.set_uid(0);
            header.set_mtime(item.mtime);
            let uid = item.uid.to_string();
            let keys: Vec<String> = item.xattrs.keys().map(|key| format!("SCHILY.xattr.{key}")).collect();
            let mut records: Vec<(&str, &[u8])> =
                keys.iter().map(String::as_str).zip(item.xattrs.values().map(Vec::as_slice)).collect();
            records.extend([("path", path.as_bytes()), ("uid", uid.as_bytes())]);
            let (kind, contents): (_, &[u8]) = match &item.what {
                What::File(contents) => (EntryType::Regular, contents),
                What::Directory => (EntryType::Directory, b""),
                What::Symlink(target) => {
                    records.push(("linkpath", target.as_bytes()));
                    (EntryType::Symlink, b"")
                }
            };
            header.set_entry_type(kind);
            header.set_size(contents.len() as u64);
            header.set_cksum();
            tar.0.append_pax_extensions(records).unwrap();
            tar.0.append(&header, contents).unwrap();
        }
        let paths = import(&tar.finish());
        for (path, item) in &tree {
            let found = &paths[path.as_bytes()];
            let (kind, data): (u16, &[u8]) = match &item.what {
                What::File(contents) => (0o100_000, contents),
                What::Symlink(target) => (0o120_000, target.as_bytes()),
                What::Directory => (0o040_000, &found.data),
            };
            prop_assert_eq!(u32::from(found.mode), u32::from(kind) | item.mode);
            prop_assert_eq!(u64::from(found.uid), item.uid);
            prop_assert_eq!(found.mtime, (i64::try_from(item.mtime).unwrap(), 0));
            prop_assert_eq!(found.data.as_slice(), data);
            let xattrs: BTreeMap<String, Vec<u8>> = found.xattrs.iter()
                .map(|(k, v)| (String::from_utf8(k.clone()).unwrap(), v.clone())).collect();
            prop_assert_eq!(&xattrs, &item.xattrs);
        }
        // Beside the entries there are only directories that lead to them.
        for (path, found) in &paths {
            let path = String::from_utf8(path.clone()).unwrap();
            let leads = tree.keys().any(|entry| entry.starts_with(&format!("{path}/")));
            prop_assert!(path.is_empty() || tree.contains_key(&path) || (leads && found.mode == 0o040_755));
        }
    }
}
