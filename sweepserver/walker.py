"""GraphQL without a schema: graphql-core's parser and a walk over plain dicts and callables.

A full schema would refuse every new field of a newer client. Here a node is a dict whose values are plain or callable
(called with the field's arguments). An unknown *root* field is an error for that field; an unknown nested field is
null, and logged once: the early warning for a newer client.
"""

import functools
import logging
from collections.abc import Mapping

from graphql import GraphQLError, parse
from graphql.language import (
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    ListValueNode,
    NullValueNode,
    ObjectValueNode,
    OperationDefinitionNode,
    VariableNode,
)

log = logging.getLogger("sweepserver")
_CONCRETE = {"ArtifactSequence", "ArtifactPortfolio", "Run", "User"}  # `... on X` is skipped on another of these
_MISSING = object()


class Refused(Exception):
    """An answer of the kind `errors: [...]`. `status` is 200 but for an agent whose sweep is gone (404)."""

    def __init__(self, message: str, status: int = 200):
        super().__init__(message)
        self.status = status


@functools.lru_cache(maxsize=512)
def _document(text: str):
    return parse(text, no_location=True)


@functools.lru_cache(maxsize=1024)
def _log_unknown(place: str) -> None:
    log.warning("unknown field %s: answered null (a newer client?)", place)


def execute(text: str, variables: Mapping, roots: Mapping[str, Mapping], operation_name: str = "") -> dict:
    """Answers one document: {"data": ...} with "errors" where a root field was refused. `roots` maps "query" and
    "mutation" to their root fields. Raises `Refused` (status 400) where the text is no GraphQL."""
    try:
        document = _document(text)
    except GraphQLError as error:
        raise Refused(f"not GraphQL: {error.message}", 400) from None
    fragments = {d.name.value: d for d in document.definitions if isinstance(d, FragmentDefinitionNode)}
    operations = [d for d in document.definitions if isinstance(d, OperationDefinitionNode)]
    named = [d for d in operations if d.name and d.name.value == operation_name]
    if not operations:
        raise Refused("the document holds no operation", 400)
    operation = (named or operations)[0]
    values = {
        v.variable.name.value: _literal(v.default_value, {})
        for v in operation.variable_definitions or ()
        if v.default_value is not None
    }
    values.update(variables or {})
    walk = _Walk(values, fragments)
    return walk.roots(operation.selection_set, roots.get(operation.operation.value, {}))


def _literal(node, variables: Mapping):
    """The Python value of a literal; a variable that was not given is left out of objects (absent is not null)."""
    if isinstance(node, VariableNode):
        return variables.get(node.name.value, _MISSING)
    if isinstance(node, NullValueNode):
        return None
    if isinstance(node, ListValueNode):
        return [v for v in (_literal(item, variables) for item in node.values) if v is not _MISSING]
    if isinstance(node, ObjectValueNode):
        pairs = ((field.name.value, _literal(field.value, variables)) for field in node.fields)
        return {name: value for name, value in pairs if value is not _MISSING}
    kind = node.kind
    if kind == "int_value":
        return int(node.value)
    return float(node.value) if kind == "float_value" else node.value  # strings, booleans, enums


class _Walk:
    def __init__(self, variables: Mapping, fragments: Mapping):
        self.variables, self.fragments = variables, fragments

    def roots(self, selection_set, fields: Mapping) -> dict:
        data, errors = {}, []
        for key, nodes in self._collect(selection_set, {}).items():
            name, data[key] = nodes[0].name.value, None
            try:
                if name not in fields:
                    raise Refused(f"Cannot query field {name!r}: this server does not know it")
                data[key] = self._value(fields[name], nodes, name)
            except Refused as refusal:
                if refusal.status != 200:
                    raise
                log.warning("%s was refused: %s", name, refusal)
                errors.append({"message": str(refusal), "path": [key]})
        return {"data": data, "errors": errors} if errors else {"data": data}

    def _collect(self, selection_set, node: Mapping) -> dict[str, list[FieldNode]]:
        """The fields asked of `node`, fragments opened; the same key in two fragments is one field asked twice."""
        found: dict[str, list[FieldNode]] = {}
        for selection in selection_set.selections:
            if not self._included(selection):
                continue
            if isinstance(selection, FieldNode):
                found.setdefault((selection.alias or selection.name).value, []).append(selection)
                continue
            if isinstance(selection, FragmentSpreadNode):
                selection = self.fragments.get(selection.name.value)
                if selection is None:
                    continue
            condition = selection.type_condition and selection.type_condition.name.value
            if {condition, node.get("__typename", condition)} <= _CONCRETE and condition != node.get("__typename"):
                continue
            for key, nodes in self._collect(selection.selection_set, node).items():
                found.setdefault(key, []).extend(nodes)
        return found

    def _included(self, selection) -> bool:
        for directive in selection.directives or ():
            wanted = directive.name.value
            if wanted in ("include", "skip"):
                value = _literal(directive.arguments[0].value, self.variables)
                if (value is True) != (wanted == "include"):
                    return False
        return True

    def _value(self, value, nodes: list[FieldNode], place: str):
        if callable(value):
            arguments = {a.name.value: _literal(a.value, self.variables) for a in nodes[0].arguments or ()}
            value = value(**{name: given for name, given in arguments.items() if given is not _MISSING})
        return self._select(value, nodes, place)

    def _select(self, value, nodes: list[FieldNode], place: str):
        sets = [node.selection_set for node in nodes if node.selection_set]
        if not sets or value is None:
            return value
        if isinstance(value, list):
            return [self._select(item, nodes, place) for item in value]
        wanted: dict[str, list[FieldNode]] = {}
        for selection_set in sets:
            for key, found in self._collect(selection_set, value).items():
                wanted.setdefault(key, []).extend(found)
        answer = {}
        for key, found in wanted.items():
            name = found[0].name.value
            if name in value:
                answer[key] = self._value(value[name], found, f"{place}.{name}")
            else:
                if name != "__typename":
                    _log_unknown(f"{place}.{name}")
                answer[key] = None
        return answer
