//! Whatever text comes: problems that can be shown, or a configuration that can be written and read again.

use warmdock::config::Config;
use warmdock::config::environment::Environment;

/// Panics where it does not hold.
pub fn check(text: &str) {
    let environment = Environment::default();
    match Config::parse(text, &environment) {
        Ok(config) => {
            let written = config.to_json();
            let again = Config::parse(&written, &environment).expect("what is written can be read");
            assert_eq!(again.to_json(), written);
        }
        Err(problems) => {
            assert!(!problems.is_empty());
            for problem in problems.iter() {
                // Values are quoted; keys stand there as they are.
                let said = format!("{} {}", problem.found, problem.expected);
                assert!(!said.contains(char::is_control), "{said:?}");
            }
        }
    }
}
