//! The section `access`.

use std::collections::HashSet;

use super::{Validator, indexed};
use crate::config::file::{AccessFile, TokenFile};
use crate::config::given::{AbsolutePath, Written};
use crate::config::problem::quote;
use crate::config::{Access, Token};

impl Validator<'_> {
    pub(super) fn access(&mut self, file: &AccessFile) -> Option<Access> {
        let anonymous = self.read("access.anonymous", &file.anonymous);
        let mut names = HashSet::new();
        let tokens: Vec<_> = indexed("access.tokens", &file.tokens)
            .map(|(key, file)| self.token(&key, file, &mut names))
            .collect();
        for (index, token) in tokens.iter().enumerate() {
            let same = |other: &Token| {
                token
                    .as_ref()
                    .is_some_and(|token| token.secret.expose() == other.secret.expose())
            };
            if let Some(first) = tokens[..index].iter().flatten().find(|other| same(other)) {
                let found = format!("the same token as that of {}", quote(&first.name));
                self.problems.add(
                    format!("access.tokens[{index}].token_file"),
                    found,
                    "a token of its own",
                );
            }
        }
        Some(Access {
            anonymous: anonymous?.0,
            tokens: tokens.into_iter().collect::<Option<_>>()?,
        })
    }

    fn token(&mut self, key: &str, file: &TokenFile, names: &mut HashSet<String>) -> Option<Token> {
        let name_key = format!("{key}.name");
        let name = self
            .required(&name_key, file.name.as_ref())
            .and_then(|name| {
                if name.is_empty() || name.len() > 100 || name.chars().any(char::is_control) {
                    return self.wrong(&name_key, quote(&name), "a name of 1 to 100 characters");
                }
                if !names.insert(name.clone()) {
                    return self.wrong(
                        &name_key,
                        format!("{} a second time", quote(&name)),
                        "each name once",
                    );
                }
                Some(name)
            });
        let file_key = format!("{key}.token_file");
        let secret = match &file.token_file {
            Some(given) => self.secret(&file_key, given),
            None => self.missing(&file_key, &AbsolutePath::expected()),
        };
        let repos = self.patterns(&format!("{key}.repos"), &file.repos);
        let (token_file, secret) = secret?;
        Some(Token {
            name: name?,
            token_file,
            secret,
            repos: repos?,
        })
    }
}
