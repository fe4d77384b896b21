//! Images in archives: an OCI layout (OCI image specification, image-layout.md, image-index.md, manifest.md,
//! descriptor.md), or what `docker save` writes (`manifest.json` beside layers and configuration).
//!
//! Every blob is checked against the digest that leads to it, and every layer against its `diff_id`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::config::{ConfigFile, ImageConfig};
use crate::decompress::Decoder;
use crate::layer::{LayerError, apply_layer};
use crate::limits::{Budget, Limits};
use crate::spool::{Region, Spool, SpoolError};
use crate::tar::shown;
use crate::tree::Tree;

/// Most bytes of one JSON document. The specification asks registries to accept manifests of 4 MiB.
const JSON_MAX: u64 = 4 << 20;
/// Most layers (the Linux kernel, and so container engines, cannot stack more than a few hundred).
const LAYERS_MAX: usize = 512;
/// Most index files within each other.
const INDEX_DEPTH_MAX: usize = 4;
/// Most entries of all index files that are looked at.
const INDEX_ENTRIES_MAX: usize = 1000;

/// Why an image in an archive is refused.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// A file that another one names is not in the archive.
    #[error("{what} \"{name}\" is missing in the archive")]
    Missing {
        /// What it is.
        what: &'static str,
        /// Its path or digest.
        name: String,
    },
    /// A document is not what it should be.
    #[error("\"{name}\" cannot be understood")]
    Json {
        /// Its path.
        name: String,
        /// Why.
        source: serde_json::Error,
    },
    /// A digest is not of the form `sha256:` and 64 hexadecimal digits.
    #[error("the digest \"{0}\" is of an unknown kind (sha256 is known)")]
    Digest(String),
    /// Bytes do not have the digest that leads to them.
    #[error("{what} \"{name}\" does not have the digest it should have: the archive is damaged")]
    Mismatch {
        /// What it is.
        what: &'static str,
        /// Its path or digest.
        name: String,
    },
    /// There is no image for this platform.
    #[error("the archive has no image for linux/amd64 (it has: {})", .found.join(", "))]
    Platform {
        /// Platforms there are.
        found: Vec<String>,
    },
    /// There are several images.
    #[error("the archive has several images ({}): save the one you mean alone", .names.join(", "))]
    Several {
        /// Their names or digests.
        names: Vec<String>,
    },
    /// Layers and configuration do not belong together, or there are too many.
    #[error(
        "the image has {layers} layers, and its configuration lists {listed} (at most {LAYERS_MAX} are possible)"
    )]
    Layers {
        /// Layers of the manifest.
        layers: usize,
        /// Layers of the configuration.
        listed: usize,
    },
    /// A layer cannot be applied.
    #[error("layer {number}")]
    Layer {
        /// Counted from 1.
        number: usize,
        /// Why.
        source: LayerError,
    },
    /// A spool file cannot be written or read.
    #[error(transparent)]
    Spool(#[from] SpoolError),
}

#[derive(Deserialize)]
struct LayoutFile {
    #[serde(rename = "imageLayoutVersion")]
    version: String,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize, Clone)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize, Clone)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// An archive that holds an image.
pub enum Layout {
    /// An OCI layout.
    Oci,
    /// A docker archive.
    Docker(Vec<DockerEntry>),
}

/// One image of a docker archive.
pub struct DockerEntry(DockerImage);

/// What kind of archive this is; `None` for a plain root file system. A file of a root file system that only has the
/// name of one of these documents does not change that.
///
/// # Errors
/// The spool file cannot be read.
pub fn detect(files: &mut Tree, spool: &Spool) -> Result<Option<Layout>, SpoolError> {
    let mut read = |name: &str| -> Result<Option<Vec<u8>>, SpoolError> {
        let found = files.file(name.as_bytes()).filter(|region| region.length <= JSON_MAX);
        found.map(|region| spool.bytes(region, JSON_MAX, "bytes of a document")).transpose()
    };
    if let (Some(layout), Some(_)) = (read("oci-layout")?, read("index.json")?)
        && serde_json::from_slice::<LayoutFile>(&layout).is_ok_and(|layout| layout.version.starts_with("1."))
    {
        return Ok(Some(Layout::Oci));
    }
    let manifest = read("manifest.json")?;
    let images: Option<Vec<DockerImage>> = manifest.and_then(|text| serde_json::from_slice(&text).ok());
    Ok(images.filter(|images| !images.is_empty()).map(|images| {
        let entries = images.into_iter().map(DockerEntry);
        Layout::Docker(entries.collect())
    }))
}

/// A layer as it lies in the archive, with what it was before compression.
struct Layer {
    name: String,
    blob: Region,
    diff_id: [u8; 32],
}

/// Reads the image of an archive: its tree and its configuration.
///
/// # Errors
/// See [`OciError`].
pub fn read(
    layout: Layout,
    files: &mut Tree,
    spool: &mut Spool,
    limits: &Limits,
) -> Result<(Tree, ImageConfig), OciError> {
    let mut archive = Files { files, spool };
    let (config, layers) = match layout {
        Layout::Oci => archive.oci()?,
        Layout::Docker(images) => archive.docker(images)?,
    };
    let mut tree = Tree::new(limits);
    // A manifest can name one large layer many times.
    let mut budget = Budget::new("bytes of layers", limits.expanded_bytes);
    for (number, layer) in (1..).zip(layers) {
        budget.take(layer.blob.length).map_err(SpoolError::Limit)?;
        let plain = expand(spool, &layer)?;
        apply_layer(&mut tree, spool, plain).map_err(|source| OciError::Layer { number, source })?;
    }
    Ok((tree, config.into_image_config()))
}

/// The layer without its compression, checked against its `diff_id`.
fn expand(spool: &mut Spool, layer: &Layer) -> Result<Region, OciError> {
    let mut start = vec![0; usize::try_from(layer.blob.length.min(8)).unwrap_or(0)];
    spool.read(layer.blob, 0, &mut start)?;
    let compressed = Decoder::new(start.as_slice()).map_err(SpoolError::Source)?.is_compressed();
    let (plain, digest) =
        if compressed { spool.expand(layer.blob)? } else { (layer.blob, spool.digest(layer.blob)?) };
    if digest != layer.diff_id {
        return Err(OciError::Mismatch { what: "layer", name: layer.name.clone() });
    }
    Ok(plain)
}

struct Files<'a> {
    files: &'a mut Tree,
    spool: &'a Spool,
}

impl Files<'_> {
    fn find(&mut self, what: &'static str, name: &str) -> Result<Region, OciError> {
        let missing = || OciError::Missing { what, name: shown(name.as_bytes()) };
        self.files.file(name.as_bytes()).ok_or_else(missing)
    }

    fn json<T: DeserializeOwned>(&self, name: &str, region: Region) -> Result<T, OciError> {
        let text = self.spool.bytes(region, JSON_MAX, "bytes of a document")?;
        serde_json::from_slice(&text)
            .map_err(|source| OciError::Json { name: shown(name.as_bytes()), source })
    }

    /// A document by its digest, which it is checked for.
    fn document<T: DeserializeOwned>(&mut self, what: &'static str, digest: &str) -> Result<T, OciError> {
        let name = format!("blobs/sha256/{}", hex(&parse_digest(digest)?));
        let length = self.find(what, &name)?.length;
        // Before its digest is computed: an index can name a large blob a thousand times.
        Budget::new("bytes of a document", JSON_MAX).take(length).map_err(SpoolError::Limit)?;
        let region = self.blob(what, digest)?;
        self.json(digest, region)
    }

    /// The blob with this digest, which it is checked for.
    fn blob(&mut self, what: &'static str, digest: &str) -> Result<Region, OciError> {
        let wanted = parse_digest(digest)?;
        let region = self.find(what, &format!("blobs/sha256/{}", hex(&wanted)))?;
        if self.spool.digest(region)? != wanted {
            return Err(OciError::Mismatch { what, name: digest.into() });
        }
        Ok(region)
    }

    fn oci(&mut self) -> Result<(ConfigFile, Vec<Layer>), OciError> {
        let region = self.find("index", "index.json")?;
        let index: Index = self.json("index.json", region)?;
        let mut search = Search::default();
        self.search(index, INDEX_DEPTH_MAX, &mut search)?;
        // One image may have several names.
        search.images.sort_by(|a, b| a.0.cmp(&b.0));
        search.images.dedup_by(|a, b| a.0 == b.0);
        if search.images.len() > 1 {
            let images = search.images.into_iter();
            let mut names: Vec<String> = images.map(|(digest, name, ..)| name.unwrap_or(digest)).collect();
            names.sort();
            return Err(OciError::Several { names });
        }
        let Some((_, _, manifest, config)) = search.images.pop() else {
            search.platforms.sort();
            search.platforms.dedup();
            return Err(OciError::Platform { found: search.platforms });
        };
        let diff_ids = check_layers(&config, manifest.layers.len())?;
        let mut layers = vec![];
        for (layer, diff_id) in manifest.layers.iter().zip(diff_ids) {
            let blob = self.blob("layer", &layer.digest)?;
            layers.push(Layer { name: layer.digest.clone(), blob, diff_id });
        }
        Ok((config, layers))
    }

    /// Collects the images for this platform from an index and those it leads to.
    fn search(&mut self, index: Index, depth: usize, search: &mut Search) -> Result<(), OciError> {
        for descriptor in index.manifests {
            search.looked_at += 1;
            if search.looked_at > INDEX_ENTRIES_MAX {
                return Err(OciError::Several { names: vec![format!("more than {INDEX_ENTRIES_MAX}")] });
            }
            if let Some(platform) = &descriptor.platform
                && !search.suits(&platform.os, &platform.architecture)
            {
                continue;
            }
            let is_index = descriptor.media_type.ends_with("index.v1+json")
                || descriptor.media_type.ends_with("manifest.list.v2+json");
            if is_index {
                if depth > 0 {
                    let index = self.document("index", &descriptor.digest)?;
                    self.search(index, depth - 1, search)?;
                }
                continue;
            }
            let manifest: Manifest = self.document("manifest", &descriptor.digest)?;
            let config: ConfigFile = self.document("configuration", &manifest.config.digest)?;
            if search.suits(&config.os, &config.architecture) {
                let name = descriptor.annotations.as_ref().and_then(|all| {
                    all.get("io.containerd.image.name")
                        .or_else(|| all.get("org.opencontainers.image.ref.name"))
                });
                let name = name.map(|name| shown(name.as_bytes()));
                search.images.push((descriptor.digest, name, manifest, config));
            }
        }
        Ok(())
    }

    fn docker(&mut self, mut images: Vec<DockerEntry>) -> Result<(ConfigFile, Vec<Layer>), OciError> {
        if images.len() > 1 {
            let name = |entry: DockerEntry| entry.0.repo_tags.unwrap_or_default().into_iter().next();
            let names =
                images.into_iter().map(|entry| name(entry).unwrap_or_else(|| "one without a name".into()));
            return Err(OciError::Several { names: names.map(|name| shown(name.as_bytes())).collect() });
        }
        let missing = || OciError::Missing { what: "image", name: "manifest.json".into() };
        let image = images.pop().ok_or_else(missing)?.0;
        let region = self.find("configuration", &image.config)?;
        // Its name is its digest, in older archives with `.json` behind it.
        let stem = image.config.rsplit('/').next().unwrap_or("").trim_end_matches(".json");
        if let Ok(wanted) = parse_digest(&format!("sha256:{stem}"))
            && self.spool.digest(region)? != wanted
        {
            return Err(OciError::Mismatch { what: "configuration", name: shown(image.config.as_bytes()) });
        }
        let config: ConfigFile = self.json(&image.config, region)?;
        let mut search = Search::default();
        if !search.suits(&config.os, &config.architecture) {
            return Err(OciError::Platform { found: search.platforms });
        }
        let diff_ids = check_layers(&config, image.layers.len())?;
        let mut layers = vec![];
        for (name, diff_id) in image.layers.iter().zip(diff_ids) {
            layers.push(Layer { name: shown(name.as_bytes()), blob: self.find("layer", name)?, diff_id });
        }
        Ok((config, layers))
    }
}

/// What a search through index files has found.
#[derive(Default)]
struct Search {
    looked_at: usize,
    platforms: Vec<String>,
    /// Digest, name, manifest and configuration of each image for this platform.
    images: Vec<(String, Option<String>, Manifest, ConfigFile)>,
}

impl Search {
    fn suits(&mut self, os: &str, architecture: &str) -> bool {
        let suits = os == "linux" && architecture == "amd64";
        if !suits {
            self.platforms.push(shown(format!("{os}/{architecture}").as_bytes()));
        }
        suits
    }
}

fn check_layers(config: &ConfigFile, layers: usize) -> Result<Vec<[u8; 32]>, OciError> {
    let listed = &config.rootfs.diff_ids;
    if listed.len() != layers || layers > LAYERS_MAX {
        return Err(OciError::Layers { layers, listed: listed.len() });
    }
    listed.iter().map(|digest| parse_digest(digest)).collect()
}

fn parse_digest(text: &str) -> Result<[u8; 32], OciError> {
    let wrong = || OciError::Digest(shown(text.as_bytes()));
    let digits = text.strip_prefix("sha256:").filter(|digits| digits.len() == 64).ok_or_else(wrong)?;
    let mut digest = [0; 32];
    for (byte, pair) in digest.iter_mut().zip(digits.as_bytes().chunks(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
        let lower = pair.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
        *byte = u8::from_str_radix(pair, 16).ok().filter(|_| lower).ok_or_else(wrong)?;
    }
    Ok(digest)
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
