//! Images in archives: OCI layouts and docker archives.

use std::io::Write;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::*;
use crate::ImageConfig;

fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

fn config(layers: &[Vec<u8>]) -> Value {
    let diff_ids: Vec<String> = layers.iter().map(|layer| format!("sha256:{}", digest(layer))).collect();
    json!({
        "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "config": {
            "Entrypoint": ["/bin/server"], "Cmd": ["--port", "80"], "Env": ["A=b"], "WorkingDir": "/srv",
            "User": "web:web", "ExposedPorts": {"80/tcp": {}}, "Labels": {"l": "v"}, "StopSignal": "SIGQUIT",
            "Volumes": null, "OnBuild": null,
        },
    })
}

/// An OCI layout that grows blob by blob.
struct Layout {
    tar: Tar,
    manifests: Vec<Value>,
}

impl Layout {
    fn new() -> Self {
        Self { tar: Tar::new().file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#), manifests: vec![] }
    }

    fn blob(&mut self, kind: &str, bytes: &[u8]) -> Value {
        let digest = digest(bytes);
        let tar = std::mem::replace(&mut self.tar, Tar::new());
        self.tar = tar.file(&format!("blobs/sha256/{digest}"), bytes);
        json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": bytes.len()})
    }

    fn image(&mut self, config: &Value, layers: &[Vec<u8>]) -> Value {
        let layers: Vec<Value> =
            layers.iter().map(|l| self.blob("application/vnd.oci.image.layer.v1.tar+gzip", l)).collect();
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers}).to_string();
        self.blob("application/vnd.oci.image.manifest.v1+json", manifest.as_bytes())
    }

    fn finish(self) -> Vec<u8> {
        let index = json!({"schemaVersion": 2, "manifests": self.manifests}).to_string();
        self.tar.file("index.json", index.as_bytes()).finish()
    }
}

fn one_image(config: &Value, layers: &[Vec<u8>]) -> Vec<u8> {
    let mut layout = Layout::new();
    let manifest = layout.image(config, layers);
    layout.manifests.push(manifest);
    layout.finish()
}

fn docker(config: &Value, layers: &[Vec<u8>]) -> Vec<u8> {
    let config = config.to_string();
    let name = format!("{}.json", digest(config.as_bytes()));
    let mut tar = Tar::new().file(&name, config.as_bytes());
    let mut names = vec![];
    for (number, layer) in layers.iter().enumerate() {
        names.push(format!("{number}/layer.tar"));
        tar = tar.directory(&format!("{number}/")).file(&names[number], layer);
    }
    let manifest = json!([{"Config": name, "RepoTags": ["app:latest"], "Layers": names}]);
    tar.file("manifest.json", manifest.to_string().as_bytes()).finish()
}

/// A base, changes to it, and more changes.
fn layers() -> Vec<Vec<u8>> {
    let base = Tar::new()
        .directory("etc/")
        .file("etc/a", b"base")
        .file("etc/b", b"base")
        .file("etc/c", b"base")
        .directory("var/")
        .directory("var/cache/")
        .file("var/cache/old", b"base")
        .file("tool", b"base");
    let second = Tar::new()
        .file("etc/a", b"second")
        .file("etc/.wh.b", b"")
        // What is in the same layer is not hidden, wherever the whiteout stands.
        .file("var/cache/new", b"second")
        .file("var/cache/.wh..wh..opq", b"")
        .hardlink("tool2", "tool")
        .file(".wh.missing", b"")
        .directory(".wh..wh.plnk/")
        .file(".wh..wh.plnk/x", b"");
    let third = Tar::new().file(".wh.tool", b"").file("etc/b", b"third");
    vec![base.finish(), second.finish(), third.finish()]
}

fn check(paths: &Paths) {
    let names: Vec<String> =
        paths.keys().filter(|p| !p.is_empty()).map(|p| String::from_utf8(p.clone()).unwrap()).collect();
    assert_eq!(names, ["etc", "etc/a", "etc/b", "etc/c", "tool2", "var", "var/cache", "var/cache/new"]);
    let data = |path: &str| paths[path.as_bytes()].data.as_slice();
    assert_eq!((data("etc/a"), data("etc/b")), (b"second".as_slice(), b"third".as_slice()));
    assert_eq!((data("etc/c"), data("tool2")), (b"base".as_slice(), b"base".as_slice()));
    assert_eq!(paths[b"tool2".as_slice()].links, 1);
}

fn expected() -> ImageConfig {
    ImageConfig {
        entrypoint: vec!["/bin/server".into()],
        cmd: vec!["--port".into(), "80".into()],
        env: vec!["A=b".into()],
        cwd: "/srv".into(),
        user: "web:web".into(),
        exposed_ports: vec!["80/tcp".into()],
        labels: [("l".to_owned(), "v".to_owned())].into(),
        stop_signal: Some("SIGQUIT".into()),
        health: None,
    }
}

#[test]
fn the_layers_of_an_oci_layout_are_applied_in_order_with_their_whiteouts() {
    let plain = layers();
    let packed = vec![gzip(&plain[0]), zstd(&plain[1]), plain[2].clone()];
    let archive = one_image(&config(&plain), &packed);
    let (imported, paths, _) = import_with(&Limits::default(), &archive).unwrap();
    check(&paths);
    assert_eq!(imported.config, expected());
}

#[test]
fn a_docker_archive_gives_the_same_image_as_an_oci_layout() {
    let plain = layers();
    let limits = Limits::default();
    let (imported, paths, _) = import_with(&limits, &docker(&config(&plain), &plain)).unwrap();
    check(&paths);
    assert_eq!(imported, import_with(&limits, &one_image(&config(&plain), &plain)).unwrap().0);
}

#[test]
fn a_layer_that_a_docker_archive_has_once_and_names_twice_is_found_over_its_link() {
    let layer = Tar::new().file("a", b"x").finish();
    let config = config(&[layer.clone(), layer.clone()]).to_string();
    let manifest = json!([{"Config": "c.json", "RepoTags": null, "Layers": ["1/layer.tar", "2/layer.tar"]}]);
    let archive = Tar::new()
        .file("c.json", config.as_bytes())
        .file("1/layer.tar", &layer)
        .symlink("2/layer.tar", "../1/layer.tar")
        .file("manifest.json", manifest.to_string().as_bytes())
        .finish();
    assert_eq!(import(&archive)[b"a".as_slice()].data, b"x");
}

#[test]
fn a_configuration_without_anything_to_run_is_empty() {
    let layer = Tar::new().file("a", b"x").finish();
    let mut config = config(std::slice::from_ref(&layer));
    config["config"] = Value::Null;
    let imported = import_with(&Limits::default(), &one_image(&config, &[layer])).unwrap().0;
    assert_eq!(imported.config, ImageConfig::default());
}

#[test]
fn the_image_for_this_platform_is_chosen_from_an_index_of_many() {
    let mut layout = Layout::new();
    let mut of = |architecture: &str| {
        let layer = Tar::new().file(architecture, b"x").finish();
        let mut config = config(std::slice::from_ref(&layer));
        config["architecture"] = architecture.into();
        let mut manifest = layout.image(&config, &[layer]);
        manifest["platform"] = json!({"os": "linux", "architecture": architecture});
        manifest
    };
    let mut manifests = vec![of("arm64"), of("amd64")];
    let mut attestation = of("unknown");
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    manifests.push(attestation);
    let index = json!({"schemaVersion": 2, "manifests": manifests}).to_string();
    let index = layout.blob("application/vnd.oci.image.index.v1+json", index.as_bytes());
    layout.manifests.push(index);
    let paths = import(&layout.finish());
    assert!(paths.contains_key(b"amd64".as_slice()) && !paths.contains_key(b"arm64".as_slice()));
}

#[test]
fn an_image_for_another_platform_is_refused_with_what_there_is() {
    let layer = Tar::new().finish();
    let mut config = config(std::slice::from_ref(&layer));
    config["architecture"] = "arm64".into();
    for archive in [one_image(&config, std::slice::from_ref(&layer)), docker(&config, &[layer])] {
        let text = refusal(&archive);
        assert!(text.contains("linux/amd64") && text.contains("linux/arm64"), "{text}");
    }
}

#[test]
fn several_images_in_one_archive_are_refused_by_name() {
    let mut layout = Layout::new();
    for name in ["one", "two"] {
        let layer = Tar::new().file(name, b"x").finish();
        let mut manifest = layout.image(&config(std::slice::from_ref(&layer)), &[layer]);
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": name});
        layout.manifests.push(manifest);
    }
    let text = refusal(&layout.finish());
    assert!(text.contains("one, two"), "{text}");
}

#[test]
fn a_layer_that_was_changed_is_refused() {
    let plain = layers();
    // Its diff_id is that of another layer; the blob is what its own digest says.
    let archive = one_image(&config(&plain), &[gzip(&plain[0]), gzip(&plain[2]), gzip(&plain[1])]);
    assert!(refusal(&archive).contains("does not have the digest"));
    let archive = docker(&config(&plain), &[plain[1].clone(), plain[1].clone(), plain[2].clone()]);
    assert!(refusal(&archive).contains("layer \"0/layer.tar\" does not have the digest"));
}

#[test]
fn a_blob_that_was_changed_or_is_missing_is_refused() {
    let plain = layers();
    let mut layout = Layout::new();
    let mut manifest = layout.image(&config(&plain), &plain);
    let name = manifest["digest"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
    layout.manifests.push(manifest.clone());
    layout.tar = layout.tar.file(&format!("blobs/sha256/{name}"), b"{}");
    assert!(refusal(&layout.finish()).contains("manifest"));

    let mut layout = Layout::new();
    manifest["digest"] = format!("sha256:{}", "0".repeat(64)).into();
    layout.manifests.push(manifest);
    assert!(refusal(&layout.finish()).contains("is missing"));
}

#[test]
fn digests_that_would_lead_elsewhere_are_refused() {
    for digest in ["sha256:../../../etc/passwd", "sha512:00", "sha256:", "../x"] {
        let mut layout = Layout::new();
        layout.manifests.push(json!({"mediaType": "x", "digest": digest, "size": 1}));
        assert!(refusal(&layout.finish()).contains("unknown kind"), "{digest}");
    }
}

#[test]
fn layers_and_configuration_that_do_not_belong_together_are_refused() {
    let plain = layers();
    assert!(refusal(&one_image(&config(&plain), &plain[..2])).contains("2 layers"));
    let text = refusal(&one_image(&json!({"architecture": "amd64"}), &plain));
    assert!(text.contains("cannot be understood"), "{text}");
}

#[test]
fn a_layer_that_escapes_is_refused_with_its_number_and_entry() {
    let layers = [Tar::new().finish(), Tar::new().file("../evil", b"x").finish()];
    let text = refusal(&one_image(&config(&layers), &layers));
    assert!(text.contains("layer 2") && text.contains("../evil"), "{text}");
    let layers = [Tar::new().file("../.wh.evil", b"x").finish()];
    assert!(refusal(&one_image(&config(&layers), &layers)).contains("leaves"));
}

#[test]
fn a_layer_that_is_a_bomb_is_stopped() {
    let layer = Tar::new().file("zeros", &vec![0; 4 << 20]).finish();
    let archive = one_image(&config(std::slice::from_ref(&layer)), &[gzip(&layer)]);
    let limits = Limits { expanded_bytes: 1 << 20, ..Limits::default() };
    assert!(refusal_with(&limits, &archive).contains("after decompression"));
}

#[test]
fn an_index_that_leads_to_itself_many_times_ends() {
    // A chain of index files deeper than is followed.
    let mut layout = Layout::new();
    let layer = Tar::new().finish();
    let mut last = layout.image(&config(std::slice::from_ref(&layer)), &[layer]);
    for _ in 0..10 {
        let index = json!({"manifests": vec![last; 3]}).to_string();
        last = layout.blob("application/vnd.oci.image.index.v1+json", index.as_bytes());
    }
    layout.manifests.push(last);
    let text = refusal(&layout.finish());
    assert!(text.contains("linux/amd64"), "{text}");
}

#[test]
fn a_root_file_system_with_a_file_of_such_a_name_stays_one() {
    let archive =
        Tar::new().file("manifest.json", b"{\"name\": \"my web app\"}").file("index.json", b"[]").finish();
    let paths = import(&archive);
    assert!(paths.contains_key(b"manifest.json".as_slice()));
}
