//! What a VM runs: the words of its image and of its spec, merged as docker does.

use blixard_api::image::ImageConfig;
use blixard_api::vm::VmSpec;
use blixard_vmm_api::guest::Command as Workload;

/// The program with its surroundings; `None` when neither names one (the guest then runs a shell on its console).
///
/// The image's command is the arguments of the image's entry point only: a spec that replaces the entry point does not
/// inherit it. The environment of the spec is added to the image's, entry by entry.
pub fn effective(image: &ImageConfig, spec: &VmSpec) -> Option<Workload> {
    let inherited = if spec.entrypoint.is_none() { image.command.as_slice() } else { &[] };
    let entrypoint = spec.entrypoint.as_ref().unwrap_or(&image.entrypoint);
    let arguments = spec.command.as_deref().unwrap_or(inherited);
    let args: Vec<String> = entrypoint.iter().chain(arguments).cloned().collect();
    if args.is_empty() {
        return None;
    }
    let mut env = image.env.clone();
    env.extend(spec.env.iter().map(|(k, v)| (k.clone(), v.clone())));
    let or = |ours: &Option<String>, theirs: &String| ours.clone().unwrap_or_else(|| theirs.clone());
    Some(Workload { args, env, cwd: or(&spec.cwd, &image.cwd), user: or(&spec.user, &image.user) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> VmSpec {
        serde_json::from_str(json).unwrap()
    }

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: vec!["/entry".into()],
            command: vec!["default".into()],
            env: [("A".into(), "image".into()), ("B".into(), "image".into())].into(),
            cwd: "/srv".into(),
            user: "web".into(),
            ..ImageConfig::default()
        }
    }

    #[test]
    fn an_image_runs_as_it_says_when_the_spec_says_nothing() {
        let run = effective(&image(), &spec(r#"{"image":"a"}"#)).unwrap();
        assert_eq!(run.args, ["/entry", "default"]);
        assert_eq!((run.cwd.as_str(), run.user.as_str()), ("/srv", "web"));
    }

    #[test]
    fn a_command_replaces_the_arguments_and_an_entry_point_replaces_both() {
        let run = |json| effective(&image(), &spec(json)).unwrap().args;
        assert_eq!(run(r#"{"image":"a","command":["x"]}"#), ["/entry", "x"]);
        assert_eq!(run(r#"{"image":"a","entrypoint":["/bin/sh"]}"#), ["/bin/sh"]);
        assert_eq!(
            run(r#"{"image":"a","entrypoint":["/bin/sh"],"command":["-c","id"]}"#),
            ["/bin/sh", "-c", "id"]
        );
        assert_eq!(run(r#"{"image":"a","entrypoint":[],"command":["ls"]}"#), ["ls"]);
    }

    #[test]
    fn the_environment_is_merged_entry_by_entry() {
        let run =
            effective(&image(), &spec(r#"{"image":"a","env":{"B":"spec","C":"spec"},"cwd":"/"}"#)).unwrap();
        let env: Vec<_> = run.env.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(env, ["A=image", "B=spec", "C=spec"]);
        assert_eq!(run.cwd, "/");
    }

    #[test]
    fn nothing_to_run_means_a_shell_on_the_console() {
        assert_eq!(effective(&ImageConfig::default(), &spec(r#"{"image":"a","env":{"A":"b"}}"#)), None);
    }
}
